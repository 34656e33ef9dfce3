"""Wrong hooks are refused, with an error that names them, before anything is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from by_hand import parameter_with
from told_method import Method
from torch import Tensor

import sparseopt_kernels as sk
from sparseopt_kernels.topology import update_plan
from sparseopt_kernels.topology.hooks import Counts, Layer, Magnitude


@pytest.fixture(params=["native", "PyTorch"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "PyTorch":
        monkeypatch.setattr(update_plan, "supports", lambda layers: False)


COUNTS: dict[str, tuple[Any, type[Exception], str]] = {
    "none": (None, TypeError, "Method.counts returned a NoneType, it must be a sequence of Counts"),
    "too few": ([Counts(1)], ValueError, r"returned 1 counts, it must be one for each of the 2 layers"),
    "no counts": ([1, 1], TypeError, r"returned 1 for 'parameter 0', it must be Counts\(drop, grow\)"),
    "a float": ([Counts(1.0), Counts(1)], TypeError, "for 'parameter 0', it must have two integers"),  # type: ignore[arg-type]
    "drop": (
        [Counts(0), Counts(5)],
        ValueError,
        r"for 'parameter 1': drop must be in \[0, 4\], the number of active",
    ),
    "negative": ([Counts(-1), Counts(1)], ValueError, r"'parameter 0': drop must be in \[0, 4\]"),
    "grow": ([Counts(1), Counts(1, 6)], ValueError, r"'parameter 1': grow must be in \[0, 5\]"),
    "mixed": ([Counts(1), Counts(torch.tensor([1, 0]), 1)], TypeError, "for 'parameter 1', it must have"),
    "shape by neuron": (
        [Counts(1), Counts(torch.tensor([1]), torch.tensor([1, 0]))],
        ValueError,
        r"'parameter 1': drop has dtype torch.int64 and shape \(1,\) .* must be torch.int64 of shape \(2,\)",
    ),
    "dtype by neuron": (
        [Counts(1), Counts(torch.tensor([1, 0]), torch.tensor([1.0, 0]))],
        ValueError,
        "'parameter 1': grow has dtype torch.float32",
    ),
    "drop by neuron": (
        [Counts(1), Counts(torch.tensor([3, 0]), torch.tensor([0, 0]))],
        ValueError,
        "drop must be at least 0 and at most the fan-in of each neuron",
    ),
    "grow by neuron": (
        [Counts(1), Counts(torch.tensor([1, 0]), torch.tensor([4, 0]))],
        ValueError,
        "grow must be at least 0 and at most the number of weights of each neuron that are not kept",
    ),
}
SCORES: dict[str, tuple[Callable[[Layer], Any], type[Exception], str]] = {
    "no tensor": (
        lambda layer: 1.0,
        TypeError,
        "a float for 'parameter 0', it must be a tensor",
    ),
    "shape": (
        lambda layer: torch.ones(4),
        ValueError,
        r"a score for 'parameter 0' that has shape \(4,\), the weight has \(2, 4\)",
    ),
    "device": (lambda layer: torch.ones(2, 4, device="meta"), ValueError, "is on meta, the weight is on"),
    "dtype": (lambda layer: layer.mask, ValueError, "has dtype torch.bool .* it must be dense, of real"),
    "complex": (lambda layer: torch.ones(2, 4) * 1j, ValueError, "has dtype torch.complex64"),
    "sparse": (lambda layer: torch.ones(2, 4).to_sparse(), ValueError, "layout torch.sparse_coo"),
    "NaN": (lambda layer: torch.ones(2, 4).log() / 0, ValueError, "'parameter 0' that has NaN"),
    "NaN magnitude": (
        lambda layer: Magnitude(layer.weight / 0),
        ValueError,
        "'parameter 0' that has NaN",
    ),
    "factors": (
        lambda layer: Magnitude(layer.weight, torch.ones(3, 1)),
        ValueError,
        r"has factors of shape \(3, 1\) on cpu, they must broadcast to \(2, 4\) on cpu",
    ),
    "negative factors": (
        lambda layer: Magnitude(layer.weight, torch.tensor([[1.0], [-1]])),
        ValueError,
        "has factors that are negative or NaN",
    ),
}


@pytest.mark.usefixtures("_way")
class TestWrongHooks:
    """They are refused before anything is written."""

    def setup_method(self) -> None:
        values = [[4.0, -1, 0, 0], [3, -2, 0, 0]]
        self.masks = {}
        for _ in range(2):
            parameter = parameter_with(values, [[0.0, 0, 5, 6], [0, 0, 8, 7]])
            self.masks[parameter] = parameter.detach() != 0

    def state(self, dst: Method) -> list[Any]:
        tensors = [*self.masks, *self.masks.values(), *dst.state_dict()["explored"]]
        return [*(t.detach().clone() for t in tensors), dst.state_dict()["step"], dst._due]

    def check(self, dst: Method, error: type[Exception], message: str) -> None:
        before = self.state(dst)
        with pytest.raises(error, match=message):
            dst.step()
        for got, wanted in zip(self.state(dst), before, strict=True):
            assert torch.equal(got, wanted) if isinstance(got, Tensor) else got == wanted
        assert not dst.updated

    @pytest.mark.parametrize("case", COUNTS)
    def test_counts(self, case: str) -> None:
        counts, error, message = COUNTS[case]
        self.check(Method(self.masks, counts), error, message)

    @pytest.mark.parametrize("hook", ["drop_score", "grow_score"])
    @pytest.mark.parametrize("case", SCORES)
    def test_scores(self, case: str, hook: str) -> None:
        score, error, message = SCORES[case]
        options: dict[str, Any] = {hook.removesuffix("_score"): score}
        dst = Method(self.masks, [Counts(1, 1), Counts(1, 1)], **options)
        self.check(dst, error, rf"^Method\.{hook} returned .*{message}")

    @pytest.mark.parametrize("hook", ["can_change", "counts", "drop_score", "grow_score"])
    @pytest.mark.parametrize("what", ["mask", "weight", "gradient", "other gradient"])
    def test_a_hook_that_writes(self, hook: str, what: str) -> None:
        def write(layer: Layer) -> Any:
            if what == "other gradient":
                layer.weight.grad = torch.ones_like(layer.weight)
                return None if hook == "grow_score" else Magnitude(layer.weight)
            tensor: Tensor = getattr(layer, what)
            tensor.logical_not_() if what == "mask" else tensor.add_(1)
            return None if hook == "grow_score" else Magnitude(layer.weight)

        def counts(layers: Sequence[Layer], step: int) -> list[Counts]:
            if hook == "counts":
                write(layers[1])
            return [Counts(1, 1)] * len(layers)

        options = {} if hook == "counts" else {hook.removesuffix("_score").removeprefix("can_"): write}
        dst = Method(self.masks, counts, **options)
        explored = [own.clone() for own in dst.state_dict()["explored"]]
        layer = 1 if hook == "counts" else 0
        written = what.removeprefix("other ")
        message = rf"Method\.{hook} wrote to the {written} of 'parameter {layer}': a hook returns counts and"
        with pytest.raises(RuntimeError, match=message):
            dst.step()
        assert dst.state_dict()["step"] == 0
        if what != "mask":
            assert all(map(torch.equal, explored, dst.state_dict()["explored"]))
            assert [mask.sum().item() for mask in self.masks.values()] == [4, 4]

    def test_too_few_inputs(self) -> None:
        (parameter, _), *_ = self.masks.items()
        mask = self.masks[parameter]
        mask[1] = False
        mask[0, 2] = True
        dst = Method({parameter: mask}, [Counts(1, 1)], min_fan_in=1)
        dst.step()
        assert mask.sum(dim=1).tolist() == [2, 1]
        mask[1] = False
        mask[0] = True
        dst.min_fan_in = 2
        self.masks = {parameter: mask}
        self.check(
            dst, ValueError, r"grow must be 0 or at least 2, the inputs that neurons have less than min"
        )
        dst.answers = ([Counts(torch.tensor([1, 0]), torch.tensor([0, 1]))], None, None)
        self.check(dst, ValueError, r"a neuron would have fewer inputs than min_fan_in \(2\)")
        dst.answers = ([Counts(torch.tensor([1, 0]), torch.tensor([0, 2]))], None, None)
        dst.step()

    def test_a_mask_of_two_parameters(self) -> None:
        first, second = self.masks
        mask = self.masks[first]
        dst = Method({first: mask, second: mask}, [Counts(torch.zeros(2).long(), torch.ones(2).long())] * 2)
        with pytest.raises(ValueError, match="numbers by neuron for 'parameter 0', whose mask another"):
            dst.step()
        dst.answers = ([Counts(2, 1)] * 2, None, None)
        dst.step()
        assert int(mask.sum()) == 3
        assert not first[~mask].any()

    def test_a_method_without_counts(self) -> None:
        dst = sk.DynamicSparseTraining(self.masks, 1, stop_at=math.inf, skip_step=False)
        with pytest.raises(NotImplementedError, match="DynamicSparseTraining must define counts"):
            dst.step()

    @pytest.mark.parametrize("value", [-1, 1.5])
    def test_start_at(self, value: Any) -> None:
        with pytest.raises(ValueError, match=f"start_at is {value}, it must be an integer of at least 0"):
            Method(self.masks, [], start_at=value)
