"""Methods of one's own: what their hooks may ask for, and when they are called."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence

import pytest
import torch
from by_hand import bits, parameter_with
from hypothesis import given, settings
from hypothesis import strategies as st
from told_method import Method, eight
from torch import nn
from update_pairs import bits_of

import sparseopt_kernels as sk
from sparseopt_kernels.kernels import cpu
from sparseopt_kernels.neurons import Neurons, fan_in
from sparseopt_kernels.topology import update_plan
from sparseopt_kernels.topology.drop_and_grow import Change, LayerTensors, Ranking, TorchDropAndGrow
from sparseopt_kernels.topology.hooks import Counts, Layer, Magnitude, Score
from sparseopt_kernels.topology.native_drop_and_grow import NativeDropAndGrow
from sparseopt_kernels.topology.seeding import generator
from sparseopt_kernels.topology.selection import drop_smallest, grow_largest

REASON = cpu.CPU.unavailable(torch.device("cpu"))
needs_library = pytest.mark.skipif(REASON is not None, reason=f"backend 'cpu': {REASON}")


@pytest.fixture(params=["native", "PyTorch"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "PyTorch":
        monkeypatch.setattr(update_plan, "supports", lambda layers: False)


@pytest.mark.usefixtures("_way")
class TestByHand:
    @pytest.mark.parametrize(
        ("counts", "expected"),
        [
            (Counts(2, 2), "1000 1011"),
            (Counts(2, 1), "1000 1010"),
            (Counts(1, 3), "1001 1111"),
            (Counts(0, 2), "1100 1111"),
            (Counts(3), "1000 0000"),
            (Counts(4, 8), "1111 1111"),
            (Counts(0, 0), "1100 1100"),
        ],
    )
    def test_drop_and_growth_apart(self, counts: Counts, expected: str) -> None:
        parameter, mask = eight()
        before = parameter.detach().clone()
        dst = Method({parameter: mask}, [counts], grow=lambda layer: Magnitude(layer.gradient))
        dst.step()
        assert mask.tolist() == bits(expected).tolist()
        assert torch.equal(parameter.detach(), before * mask)
        assert dst.updated == (expected != "1100 1100")
        changed = dst.last_update["parameter 0"]
        assert changed.grown - changed.dropped == int(mask.sum()) - 4

    @pytest.mark.parametrize(
        ("score", "expected"),
        [
            (lambda layer: layer.weight.abs(), "1000 1000"),
            (lambda layer: layer.weight, "1000 1000"),
            (lambda layer: -layer.weight.abs(), "0100 0100"),
            (lambda layer: -layer.weight, "0100 0100"),
            (lambda layer: torch.arange(8), "0000 1100"),
            (lambda layer: torch.full((8,), -math.inf), "1100 0000"),
            (lambda layer: Magnitude(layer.weight - 3.5), "0100 0100"),
            (lambda layer: Magnitude(layer.weight, torch.tensor([0.1] * 4 + [1.0] * 4)), "0000 1100"),
        ],
        ids=["own", "signed", "negative", "signed-2", "integers", "infinite", "magnitude", "factors"],
    )
    def test_scores_of_what_drops(self, score: Callable[[Layer], Score], expected: str) -> None:
        parameter, mask = eight()
        Method({parameter: mask}, [Counts(2)], drop=score).step()
        assert mask.tolist() == bits(expected).tolist()

    @pytest.mark.parametrize(
        ("score", "expected"),
        [
            (lambda layer: layer.gradient, "1100 1110"),
            (lambda layer: -layer.gradient, "1110 1100"),
            (lambda layer: torch.tensor([9, 9, 0, 1, 9, 9, 2, 3]), "1100 1101"),
            (lambda layer: torch.zeros(8), "1110 1100"),
            (lambda layer: Magnitude(layer.gradient, torch.tensor([9.0] * 4 + [1.0] * 4)), "1101 1100"),
            (lambda layer: Magnitude(1 / (1 + layer.gradient)), "1110 1100"),
        ],
        ids=["own", "negative", "integers", "ties", "factors", "magnitude"],
    )
    def test_scores_of_what_grows(self, score: Callable[[Layer], Score], expected: str) -> None:
        parameter, mask = eight()
        Method({parameter: mask}, [Counts(0, 1)], grow=score).step()
        assert mask.tolist() == bits(expected).tolist()

    def test_counts_by_neuron(self) -> None:
        parameter = parameter_with([[4.0, 1, 2, 0], [0, 0, 3, 0]], [[0.0, 9, 0, 1], [5, 7, 0, 6]])
        mask = parameter.detach() != 0
        counts = Counts(torch.tensor([2, 0]), torch.tensor([1, 2]))
        dst = Method({parameter: mask}, [counts], grow=lambda layer: Magnitude(layer.gradient))
        dst.step()
        # 1 and 2 drop in the first; its weight of gradient 9 grows again, and keeps its value.
        assert mask.int().tolist() == [[1, 1, 0, 0], [0, 1, 1, 1]]
        assert parameter.tolist() == [[4, 1, 0, 0], [0, 0, 3, 0]]
        assert dst.last_update["parameter 0"][:2] == (1, 2)

    def test_of_equal_scores_by_neuron_what_was_active_comes_first(self) -> None:
        parameter = parameter_with([[0.0, 1, 0, 2], [0, 0, 1, 1]])
        mask = parameter.detach() != 0
        counts = Counts(torch.tensor([2, 2]), torch.tensor([1, 3]))
        Method({parameter: mask}, [counts], grow=lambda layer: torch.ones(2, 4)).step()
        assert mask.int().tolist() == [[0, 1, 0, 0], [1, 0, 1, 1]]

    def test_random_growth_by_neuron(self) -> None:
        counts = torch.zeros(2, 4)
        for seed in range(400):
            parameter = parameter_with([[1.0, 0, 0, 0], [0, 0, 0, 0]])
            mask = parameter.detach() != 0
            asked = Counts(torch.tensor([0, 0]), torch.tensor([1, 2]))
            Method({parameter: mask}, [asked], seed=seed).step()
            assert mask.sum(dim=1).tolist() == [2, 2]
            counts += mask
        # 133 and 200 expected; the standard deviations are 9 and 10.
        assert (counts - torch.tensor([[400.0, 133, 133, 133], [200, 200, 200, 200]])).abs().max() < 50

    def test_some_layers_at_random_and_some_by_score(self) -> None:
        (first, mask), (second, other), (third, last) = eight(), eight(), eight()
        masks = {first: mask, second: other, third: last}

        def grow(layer: Layer) -> Score | None:
            return Magnitude(layer.gradient) if layer.index == 1 and layer.gradient is not None else None

        dst = Method(masks, [Counts(2, 2), Counts(2, 2), Counts(1)], grow=grow, seed=3)
        dst.step()
        expected = eight()
        sk.SET({expected[0]: expected[1]}, 0.5, 1, stop_at=math.inf, seed=3, skip_step=False).step()
        assert torch.equal(mask, expected[1])
        assert other.tolist() == bits("1000 1011").tolist()
        assert last.tolist() == bits("1000 1100").tolist()


class TestWhenHooksAreCalled:
    def test_the_order(self) -> None:
        (first, mask), (second, other), (frozen, last) = eight(), eight(), eight()
        frozen.requires_grad_(False)
        masks = {first: mask, second: other, frozen: last}
        dst = Method(masks, [Counts(1, 1), Counts(0, 1)], update_every=2)
        dst.step()
        assert dst.asked == []
        dst.step()
        assert dst.asked == [
            *("grow_score parameter 0", "grow_score parameter 1"),
            *("counts ['parameter 0', 'parameter 1'] 2", "drop_score parameter 0"),
        ]
        assert last.tolist() == bits("1100 1100").tolist()

    def test_a_postponed_update_asks_for_no_counts(self) -> None:
        parameter, mask = eight()
        assert parameter.grad is not None
        dst = Method({parameter: mask}, [Counts(1, 1)])
        good = parameter.grad.clone()
        parameter.grad[0] = math.nan
        dst.step()
        assert dst.asked == ["grow_score parameter 0"]
        parameter.grad.copy_(good)
        dst.step()
        assert dst.asked[2] == "counts ['parameter 0'] 2"

    def test_a_method_that_gradients_do_not_postpone(self) -> None:
        class Unmoved(Method):
            postpones = False

        parameter, mask = eight()
        parameter.grad = torch.full((8,), math.nan)
        dst = Unmoved({parameter: mask}, [Counts(1)])
        dst.step()
        assert dst.updated

    def test_start_and_end(self) -> None:
        parameter, mask = eight()
        dst = Method({parameter: mask}, [Counts(1, 1)], update_every=3, start_at=4, stop_at=13)
        for _ in range(20):
            dst.step()
        assert [asked for asked in dst.asked if asked.startswith("counts")] == [
            "counts ['parameter 0'] 7",
            "counts ['parameter 0'] 10",
        ]
        with pytest.warns(UserWarning, match="the masks will never change"):
            Method({parameter: mask}, [], update_every=3, start_at=4, stop_at=7)

    def test_times_of_its_own(self) -> None:
        class Twice(Method):
            def next_update(self, step: int) -> int | None:
                return next((due for due in (2, 5) if due > step), None)

        parameter, mask = eight()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            dst = Twice({parameter: mask}, [Counts(1, 1)], stop_at=3)
        assert "next_update=2" in repr(dst)
        for _ in range(6):
            dst.step()
        assert [asked[-1] for asked in dst.asked if asked.startswith("counts")] == ["2", "5"]
        assert "next_update=none" in repr(dst)

    def test_a_step_is_left_out_where_a_layer_can_change(self) -> None:
        parameter, mask = eight()
        dst = Method({parameter: mask}, [Counts(1, 1)], skip_step=True, update_every=2)
        for due in (False, True, False):
            dst.step()
            assert dst.skip_next == due
        parameter.requires_grad_(False)
        dst.answers = ([], None, None)
        dst.step()
        assert not dst.skip_next

    def test_gradients_that_are_needed(self) -> None:
        class ByGradient(Method):
            uses_gradients = True

        parameter, mask = eight()
        other, other_mask = parameter_with([1.0, 0]), bits("10")
        dst = ByGradient({parameter: mask, other: other_mask}, [Counts(1, 1)])
        dst.step()
        assert dst.asked[-2:] == ["counts ['parameter 0'] 1", "drop_score parameter 0"]
        parameter.grad = None
        with pytest.raises(RuntimeError, match="ByGradient ranks by gradients and no masked parameter has"):
            dst.step()

    def test_the_state_has_its_settings(self) -> None:
        parameter, mask = eight()
        dst = Method({parameter: mask}, [Counts(1, 1)], seed=5, start_at=2)
        dst.told = 7
        dst.step()
        other = Method({parameter: mask}, [Counts(1, 1)])
        other.load_state_dict(dst.state_dict())
        assert (other.told, other.seed, other.start_at) == (7, 5, 2)
        assert other.state_dict()["step"] == 1
        with pytest.raises(ValueError, match=r"state_dict has keys .*, it must have .*'told'"):
            other.load_state_dict(sk.SET({parameter: mask}, stop_at=900).state_dict())
        assert copy.deepcopy(other).told == 7


@needs_library
@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    shape=st.sampled_from([(5, 9), (1, 70), (40, 3), (4, 6, 3), (90, 80)]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    min_fan_in=st.sampled_from([0, 0, 1, 2]),
)
@torch.no_grad()
def test_the_library_drops_and_grows_as_pytorch_does(
    data: st.DataObject, shape: tuple[int, ...], dtype: torch.dtype, min_fan_in: int
) -> None:
    """Any numbers of both, and scores of one's own, with ties."""
    neurons = Neurons(data.draw(st.sampled_from([0, 1])))
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    mask = torch.rand(shape, generator=random) < data.draw(st.sampled_from([0.1, 0.5, 0.95]))
    groups, segments, per_group, length = neurons.grid(shape)
    if min_fan_in * groups * per_group > int(mask.sum()) or min_fan_in > segments * length:
        min_fan_in = 0
    weight, drop_score, grow_score = (
        torch.randint(-9, 9, shape, generator=random).to(dtype) for _ in range(3)
    )
    drop_score, active = drop_score.abs(), int(mask.sum())
    missing = int((min_fan_in - fan_in(mask, neurons)).clamp_min(0).sum())
    drop = data.draw(st.integers(0, active))
    most = mask.numel() - active + drop
    grow = data.draw(st.integers(min(missing, most), most))
    grow = grow if grow >= missing else 0
    found = []
    for make in (NativeDropAndGrow, TorchDropAndGrow):
        for way in ("largest", "random"):
            layer = LayerTensors(nn.Parameter(weight * mask), mask.clone(), mask.clone())
            chooser = make([layer], [neurons], min_fan_in)
            chooser.rank([Ranking(0, grow_score, at_most=grow)])
            at_random = generator(3, 0, 1) if way == "random" else None
            update = chooser.update([Change(Counts(drop, grow), drop_score, at_random)])
            found.append((update, layer))
            if grow > 0 or min_fan_in == 0:
                assert int(layer.mask.sum()) >= active + grow - drop
            if min_fan_in == 0:
                assert int(layer.mask.sum()) == active + grow - drop
    for (update, layer), (expected, wanted) in zip(found[:2], found[2:], strict=True):
        assert update == expected
        assert all(torch.equal(bits_of(a), bits_of(b)) for a, b in zip(layer, wanted, strict=True))


@pytest.mark.parametrize("signed", [False, True], ids=["native", "signed"])
@torch.no_grad()
def test_scores_of_a_large_layer(signed: bool) -> None:
    """As the pure functions choose."""
    random = torch.Generator().manual_seed(0)
    mask = torch.rand(300, 400, generator=random) < 0.1
    weight = nn.Parameter(torch.randn(300, 400, generator=random) * mask)
    weight.grad = torch.randn(300, 400, generator=random)
    drop_score, grow_score = (torch.randn(300, 400, generator=random) for _ in range(2))
    if not signed:
        drop_score, grow_score = drop_score.abs(), grow_score.abs()
    before = mask.clone()
    dst = Method({weight: mask}, [Counts(3000, 1000)], lambda layer: drop_score, lambda layer: grow_score)
    dst.step()
    kept = drop_smallest(before, drop_score, 3000)
    assert torch.equal(mask, grow_largest(kept, before, grow_score, 1000))


@needs_library
def test_rigl_with_more_growth_than_it_told() -> None:
    """A subclass that grows more than ``drop_fraction`` is ranked again."""

    class Greedy(sk.RigL):
        def counts(self, layers: Sequence[Layer], step: int) -> list[Counts]:
            return [Counts(1, 4) for _ in layers]

    parameter, mask = eight()
    dst = Greedy({parameter: mask}, 0.25, 1, stop_at=math.inf, skip_step=False)
    dst.step()
    assert mask.tolist() == bits("1011 1111").tolist()
