"""Masks of floating-point numbers that are 0 or 1, as ``torch.nn.utils.prune`` has them."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from sparseopt_kernels import native_library
from sparseopt_kernels.masks.mapping import Masks
from sparseopt_kernels.topology.rigl import RigL
from sparseopt_kernels.topology.set import SET

BOTH = pytest.mark.parametrize("cls", [SET, RigL])


def run(
    cls: type[SET | RigL], dtype: torch.dtype, **options: Any
) -> tuple[list[Tensor], list[Tensor], SET | RigL]:
    """Some updates of two layers whose masks have that dtype: masks and weights afterwards."""
    numbers = torch.Generator().manual_seed(0)
    masks = {}
    for _ in range(2):
        mask = torch.rand(30, 40, generator=numbers) < 0.3
        masks[nn.Parameter(torch.randn(30, 40, generator=numbers) * mask)] = mask.to(dtype)
    dst = cls(masks, 0.5, 1, stop_at=math.inf, **options)
    for _ in range(3):
        for parameter in masks:
            parameter.grad = torch.randn(30, 40, generator=numbers)
        dst.step()
        assert dst.updated
    return list(masks.values()), [p.detach() for p in masks], dst


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (SET, {}),
        (SET, {"min_fan_in": 2}),
        (RigL, {}),
        (RigL, {"min_fan_in": 2}),
        (RigL, {"regrow": "corrected"}),
    ],
    ids=["SET", "SET, min_fan_in", "RigL", "RigL, min_fan_in", "RigL, corrected"],
)
@pytest.mark.parametrize("without", [False, True], ids=["library", "PyTorch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_they_change_as_boolean_ones_do_and_stay_float(
    cls: type[SET | RigL],
    options: dict[str, Any],
    dtype: torch.dtype,
    without: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected, expected_weights, boolean = run(cls, torch.bool, **options)
    if without:
        monkeypatch.setattr(native_library, "MISSING", "taken away for a test")
    found, weights, dst = run(cls, dtype, **options)
    for mask, own, weight, own_weight in zip(expected, found, expected_weights, weights, strict=True):
        assert own.dtype == dtype
        assert torch.equal(own, mask.to(dtype))
        assert torch.equal(own_weight, weight)
    assert dst.exploration_rate() == boolean.exploration_rate()
    assert {union.dtype for union in dst.state_dict()["explored"]} == {torch.bool}


@BOTH
def test_other_numbers_are_refused_before_anything_is_written(cls: type[SET | RigL]) -> None:
    parameter, mask = nn.Parameter(torch.ones(2, 4)), torch.eye(2, 4)
    parameter.grad = torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"'parameter 0' has dtype torch\.float32 and 2 values that are"):
        cls({parameter: mask * 0.5}, stop_at=900)
    dst = cls({parameter: mask}, 1.0, 1, stop_at=900)
    dst._is_new = False
    mask[0, 1] = math.nan
    with pytest.raises(ValueError, match=r"'parameter 0' has dtype .* and 1 values that are neither"):
        dst.step()
    assert int((mask == 1).sum()) == 2


class Pruned(nn.Linear):
    """A layer as ``torch.nn.utils.prune`` leaves it, for which ``Masks`` finds ``weight_orig``."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.weight_orig = nn.Parameter(torch.ones(3, 4))
        self.register_buffer("weight_orig_mask", torch.eye(3, 4).bool())


def test_rigl_refuses_a_layer_that_pytorch_prunes() -> None:
    masks = Masks(nn.Sequential(Pruned()))
    with pytest.raises(ValueError, match=r"'0\.weight_orig' was pruned by torch.*remove\(layer, 'weight'\)"):
        RigL(masks, stop_at=900)
    SET(masks, stop_at=900)


class TestMaskedGradients:
    def pruned(self, amount: float = 0.5) -> tuple[nn.Sequential, dict[Any, Tensor]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(80, 70), nn.ReLU(), nn.Linear(70, 60))
        for layer in (model[0], model[2]):
            prune.random_unstructured(layer, "weight", amount)
        names = [("0.weight_orig", "0.weight_mask"), ("2.weight_orig", "2.weight_mask")]
        return model, {model.get_parameter(p): model.get_buffer(m) for p, m in names}

    def backward(self, model: nn.Module) -> None:
        model.zero_grad()
        model(torch.randn(16, 80)).square().sum().backward()

    @pytest.mark.parametrize("without", [False, True], ids=["library", "PyTorch"])
    @pytest.mark.parametrize("regrow", ["original", "corrected"])
    def test_they_are_warned_of_once(
        self, without: bool, regrow: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if without:
            monkeypatch.setattr(native_library, "MISSING", "taken away for a test")
        model, masks = self.pruned()
        dst = RigL(masks, 0.3, 2, stop_at=900, regrow=regrow)
        self.backward(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            dst.step()  # no update is due
        with pytest.warns(UserWarning, match="gradients are masked: .*RigL needs dense gradients") as record:
            dst.step()
        assert record[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(2):
                self.backward(model)
                dst.step()

    @pytest.mark.parametrize("without", [False, True], ids=["library", "PyTorch"])
    @pytest.mark.parametrize("kind", ["one of inactive", "of one layer", "SET"])
    def test_what_is_not_warned_of(self, kind: str, without: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        if without:
            monkeypatch.setattr(native_library, "MISSING", "taken away for a test")
        model, masks = self.pruned()
        self.backward(model)
        first, second = masks
        assert not first.grad[masks[first] == 0].any()
        if kind == "one of inactive":
            place = (masks[first] == 0).nonzero()[1234]
            first.grad[tuple(place)] = 1e-30
        elif kind == "of one layer":
            second.grad = torch.randn_like(second)
        dst = (SET if kind == "SET" else RigL)(masks, 0.3, 1, stop_at=900)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            dst.step()

    @pytest.mark.parametrize("without", [False, True], ids=["library", "PyTorch"])
    def test_gradients_of_zero(self, without: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """As after ``zero_grad(set_to_none=False)``: nothing ranks, and no mask ever changes."""
        if without:
            monkeypatch.setattr(native_library, "MISSING", "taken away for a test")
        _, masks = self.pruned()
        for p in masks:
            p.grad = torch.zeros_like(p)
        dst = RigL(masks, 0.3, 1, stop_at=900, skip_step=False)
        with pytest.warns(UserWarning, match="an update of RigL has changed no mask: the gradients .* are 0"):
            dst.step()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            dst.step()  # once is enough

    def test_set_works_on_layers_that_pytorch_prunes(self) -> None:
        model, masks = self.pruned(0.9)
        counts = [int(mask.sum()) for mask in masks.values()]
        dst = SET(masks, 0.5, 1, stop_at=900)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            self.backward(model)
            dst.step()
            assert dst.updated
            optimizer.step()
            assert [int(mask.sum()) for mask in masks.values()] == counts
            assert {mask.dtype for mask in masks.values()} == {torch.float32}
        model(torch.randn(2, 80))
        assert int(vars(model[0])["weight"].count_nonzero()) <= counts[0]
