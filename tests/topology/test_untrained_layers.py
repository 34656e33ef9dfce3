"""Layers whose masks are updated, although nothing trains them: a warning, or they are left as they are."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import sparseopt_kernels as sk

METHODS = {
    "SET": lambda masks, **options: sk.SET(masks, update_every=3, stop_at=100, **options),
    "RigL": lambda masks, **options: sk.RigL(masks, update_every=3, stop_at=100, **options),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 5))


def train(model: nn.Sequential, opt: Any, dst: Any, count: int) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(count):
            opt.zero_grad()
            model(torch.randn(16, 20)).square().mean().backward()
            dst.step()
            opt.step()
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("skip_step", [True, False])
def test_an_optimizer_of_the_head_alone(name: str, skip_step: bool) -> None:
    model = network()
    masks = sk.sparsify(model, 0.5, "uniform")
    opt = sk.SparseOpt(model[3].parameters(), 0.01, masks=masks)
    (said,) = train(model, opt, METHODS[name](masks, skip_step=skip_step), 30)
    assert said.startswith(f"between two updates of {name}, nothing has changed the weights of '0.weight': ")
    assert f"leave their masks out of {name}" in said


@pytest.mark.parametrize("name", METHODS)
def test_the_advice_helps(name: str) -> None:
    model = network()
    masks = sk.sparsify(model, 0.5, "uniform")
    opt = sk.SparseOpt(model[3].parameters(), 0.01, masks=masks)
    assert train(model, opt, METHODS[name](masks.subset(model[3].parameters())), 30) == []


@pytest.mark.parametrize("name", METHODS)
def test_weights_that_are_written_past_the_count_of_pytorch(name: str) -> None:
    """As a CUDA graph does, or ZeRO's broadcast of ``p.data``."""
    model = network()
    masks = sk.sparsify(model, 0.5, "uniform")

    class Uncounted(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for p in self.param_groups[0]["params"]:
                p.data.sub_(p.grad * masks.get(p, 1.0), alpha=0.01)

    versions = [p._version for p in masks]
    assert train(model, Uncounted(model.parameters(), 0.01), METHODS[name](masks), 3) == []
    written = [p._version for p in masks]
    assert written != versions  # by the update
    assert train(model, Uncounted(model.parameters(), 0.01), METHODS[name](masks), 20) == []


@pytest.mark.parametrize("name", METHODS)
def test_a_frozen_layer_with_an_old_gradient_keeps_its_mask(name: str) -> None:
    model = network()
    masks = sk.sparsify(model, 0.5, "uniform")
    body, head = (model.get_parameter(f"{layer}.weight") for layer in (0, 3))
    train(model, sk.SparseOpt(model.parameters(), 0.01, masks=masks), METHODS[name](masks), 2)
    for layer in (model[0], model[1]):
        layer.requires_grad_(False)
    assert body.grad is not None
    before, mask, of_head = body.clone(), masks[body].clone(), masks[head].clone()
    opt = sk.SparseOpt(model[3].parameters(), 0.01, masks=masks)
    assert train(model, opt, METHODS[name](masks), 20) == []
    assert torch.equal(body, before)
    assert torch.equal(masks[body], mask)
    assert not torch.equal(masks[head], of_head)
