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
ALL = {**METHODS, "GMP": lambda masks, **_: sk.GMP(masks, 0.9, update_every=3, stop_at=100)}


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


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("skip_step", [True, False])
def test_an_optimizer_of_the_head_alone(name: str, skip_step: bool) -> None:
    model = network()
    masks = sk.sparsify(model, 0.5, "uniform")
    opt = sk.SparseOpt(model[3].parameters(), 0.01, masks=masks)
    (said,) = train(model, opt, ALL[name](masks, skip_step=skip_step), 30)
    assert said.startswith(f"between updates of {name}, nothing changes the weights of '0.weight', and each ")
    assert f"leave their masks out of {name}" in said


@pytest.mark.parametrize("name", METHODS)
def test_the_advice_helps(name: str) -> None:
    model = network()
    masks = sk.sparsify(model, 0.5, "uniform")
    opt = sk.SparseOpt(model[3].parameters(), 0.01, masks=masks)
    assert train(model, opt, METHODS[name](masks.subset(model[3].parameters())), 30) == []


class Uncounted(torch.optim.SGD):
    """Writes as a CUDA graph does, or ZeRO's broadcast of ``p.data``: PyTorch does not count it."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            p.data.sub_(p.grad, alpha=0.01)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("of", ["a fused optimizer", "data"])
def test_writes_that_pytorch_does_not_count(name: str, of: str) -> None:
    """To the end of the schedule, when hardly a weight grows, and with inputs that are 0."""
    model = network()
    masks = sk.sparsify(model, 0.5, "uniform")
    fused = of == "a fused optimizer"
    opt = torch.optim.SGD(model.parameters(), 0.01, fused=True) if fused else Uncounted(model.parameters())
    dst = ALL[name](masks)
    model(torch.randn(16, 20)).square().mean().backward()
    version = model.get_parameter("0.weight")._version
    opt.step()
    assert model.get_parameter("0.weight")._version == version
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(120):
            opt.zero_grad()
            inputs = torch.randn(16, 20)
            inputs[:, :10] = 0
            model(inputs).square().mean().backward()
            for p, mask in masks.items():
                assert p.grad is not None
                p.grad.mul_(mask) if name != "RigL" else None
            dst.step()
            opt.step()
            for p, mask in masks.items():
                p.data.mul_(mask)
    assert [str(w.message) for w in caught] == []


@pytest.mark.parametrize("name", METHODS)
def test_a_layer_that_is_frozen_in_inference_mode(name: str) -> None:
    model = network()
    with torch.inference_mode():
        model[0] = nn.Linear(20, 30).requires_grad_(False)
        weights = [model.get_parameter(f"{layer}.weight") for layer in (0, 3)]
        masks = {weight: torch.rand_like(weight) < 0.5 for weight in weights}
        weights[0].mul_(masks[weights[0]])
    masks = {weight: mask.clone() for weight, mask in masks.items()}
    opt = sk.SparseOpt([weights[1]], 0.01, masks={weights[1]: masks[weights[1]]})
    assert train(model, opt, METHODS[name](masks), 20) == []


@pytest.mark.parametrize("name", METHODS)
def test_an_old_gradient_of_a_frozen_layer_that_is_not_finite(name: str) -> None:
    model = network()
    masks = sk.sparsify(model, 0.5, "uniform")
    body = model.get_parameter("0.weight").requires_grad_(False)
    body.grad = torch.full_like(body, torch.inf)
    dst = METHODS[name](masks)
    assert train(model, sk.SparseOpt(model[3].parameters(), 0.01, masks=masks), dst, 3) == []
    assert dst.updated


def test_that_rigl_is_called_after_zero_grad_is_an_error_beside_an_old_gradient() -> None:
    model = network()
    masks = sk.sparsify(model, 0.5, "uniform")
    body = model.get_parameter("0.weight").requires_grad_(False)
    body.grad = torch.ones_like(body)
    dst = METHODS["RigL"](masks)
    dst.step()
    dst.step()
    with pytest.raises(RuntimeError, match="before opt"):
        dst.step()


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
