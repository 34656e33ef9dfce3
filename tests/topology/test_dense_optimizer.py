"""The warning of an optimizer that does not know the masks."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.optim import SGD, AdamW, Optimizer

import sparseopt_kernels as sk
from sparseopt_kernels.topology import update_plan

SAID = (
    r"weights of '[03].weight' outside its mask are not 0 \(\d+ of \d+ that were looked at\): the optimizer"
)
Methods = dict[str, Callable[[sk.Masks], Any]]
METHODS: Methods = {
    "RigL": lambda masks: sk.RigL(masks, update_every=3, stop_at=100),
    "SET": lambda masks: sk.SET(masks, update_every=3, stop_at=100),
    "GMP": lambda masks: sk.GMP(masks, 0.9, update_every=3, stop_at=30),
}


def trained(
    method: str, make: Callable[[nn.Module, sk.Masks], Optimizer], by_hand: bool = False
) -> list[str]:
    """What was said in twelve steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 5))
    masks = sk.sparsify(model, 0.0 if method == "GMP" else 0.8)
    opt, dst = make(model, masks), METHODS[method](masks)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(12):
            opt.zero_grad()
            model(torch.randn(16, 20)).square().mean().backward()
            dst.step()
            opt.step()
            if by_hand:
                sk.apply_masks(model)
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cls", [SGD, AdamW])
def test_an_optimizer_of_pytorch_is_warned_of_once(method: str, cls: type[Optimizer]) -> None:
    (said,) = trained(method, lambda model, _: cls(model.parameters(), lr=0.01))  # type: ignore[call-arg]
    assert re.match(SAID, said)


@pytest.mark.parametrize("method", METHODS)
def test_sparse_opt_is_not(method: str) -> None:
    assert trained(method, lambda model, masks: sk.SparseOpt(model.parameters(), 0.01, masks=masks)) == []


@pytest.mark.parametrize("method", METHODS)
def test_nor_masks_that_are_applied_by_hand(method: str) -> None:
    assert trained(method, lambda model, _: SGD(model.parameters(), 0.01, 0.9), by_hand=True) == []


def test_nor_a_first_step_that_zeroes_what_is_outside() -> None:
    """Masks in a dict, of a dense model: they are applied by the first step of the optimizer."""
    weight = nn.Parameter(torch.ones(4, 5))
    masks = {weight: torch.eye(4, 5) > 0}
    opt = sk.SparseOpt([weight], 0.01, masks=masks)
    dst = sk.SET(masks, update_every=1, stop_at=9, skip_step=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            weight.grad = torch.ones(4, 5)
            dst.step()
            opt.step()


def test_nor_a_forward_pass_that_applies_the_masks() -> None:
    """As in ``torch.nn.utils.prune``: weights outside are kept, and have no gradient."""
    weight = nn.Parameter(torch.ones(4, 5))
    masks = {weight: torch.eye(4, 5) > 0}
    opt, dst = SGD([weight], 0.01), sk.SET(masks, update_every=2, stop_at=9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(6):
            opt.zero_grad()
            (weight * masks[weight]).square().sum().backward()
            dst.step()
            opt.step()
    assert weight.count_nonzero() > 8


def test_one_of_a_second_phase_is_noticed_too() -> None:
    """After many updates with an optimizer that knows the masks; layers are looked at in turns."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 5))
    masks = sk.sparsify(model, 0.8)
    first, second = model.get_parameter("0.weight"), model.get_parameter("3.weight")
    dst = sk.SET(masks, update_every=2, stop_at=100)
    others = [p for p in model.parameters() if p is not second]
    optimizers: list[Optimizer] = [sk.SparseOpt(model.parameters(), 0.01, masks=masks)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(40):
            if step == 20:
                optimizers = [sk.SparseOpt(others, 0.01, masks=masks), AdamW([second], 0.01)]
            model.zero_grad()
            model(torch.randn(16, 20)).square().mean().backward()
            dst.step()
            for opt in optimizers:
                opt.step()
    (said,) = [str(w.message) for w in caught]
    assert re.match(SAID, said)
    assert "'3.weight'" in said
    assert not first[~masks[first]].any()


def test_prune_with_a_penalty_is_not() -> None:
    """Its weights outside have gradients then, and are kept all the same."""
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))
    for layer in (model[0], model[2]):
        prune.random_unstructured(layer, "weight", 0.8)
    dst, opt = sk.SET(sk.Masks(model), update_every=2, stop_at=100), SGD(model.parameters(), 0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(12):
            opt.zero_grad()
            penalty = sum(p.square().sum() for p in model.parameters())
            (model(torch.randn(16, 20)).square().mean() + 0.01 * penalty).backward()
            dst.step()
            opt.step()


def test_an_infinite_gradient_times_a_mask_does_not_count() -> None:
    weight = nn.Parameter(torch.ones(4, 10))
    masks = {weight: torch.eye(4, 10) > 0}
    dst = sk.GMP(masks, 0.95, update_every=2, stop_at=20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(8):
            weight.grad = torch.full((4, 10), math.inf) * masks[weight]
            dst.step()
            weight.data.add_(masks[weight])


def test_a_large_layer_is_looked_at_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_plan, "_LOOKED_AT", 100)
    weight = nn.Parameter(torch.ones(40, 20))
    masks = {weight: torch.eye(40, 20) > 0}
    dst = sk.SET(masks, update_every=2, stop_at=9, skip_step=False)
    weight.grad = torch.ones(40, 20)
    dst.step()
    with pytest.warns(UserWarning, match=r"weights of 'parameter 0' .* \(95 of 95 that were looked at\)"):
        dst.step()


@pytest.mark.parametrize("shape", [(), (0, 4), (4, 0), (1,)])
def test_layers_of_any_shape(shape: tuple[int, ...]) -> None:
    weight = nn.Parameter(torch.ones(shape))
    dst = sk.SET({weight: torch.ones(shape, dtype=torch.bool)}, update_every=2, stop_at=9, skip_step=False)
    weight.grad = torch.ones(shape)
    for _ in range(5):
        dst.step()
