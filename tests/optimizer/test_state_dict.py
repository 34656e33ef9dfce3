"""Checkpoints: what they hold, and that SGD and SparseOpt read each other's."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from backends import Backend
from network import Network, assert_same, assert_same_state, each_hyper, each_mapping, run
from side_by_side import pattern_mask, same_bits
from torch import Tensor
from torch.nn.parameter import Parameter
from torch.optim import SGD

from sparseopt_kernels.masks.mapping import Masks
from sparseopt_kernels.optimizer import SparseOpt


def test_state_dict_holds_momentum_buffers_and_nothing_else(backend: Backend) -> None:
    model = Network()
    optimizer = SparseOpt(
        model.parameters(), lr=0.1, momentum=0.9, max_grad_norm=1.0, masks=Masks(model), backend=backend.name
    )
    run(model, optimizer, range(2))
    state = optimizer.state_dict()
    assert set(state) == {"state", "param_groups"}
    for i, p in enumerate(model.parameters()):
        assert set(state["state"][i]) == {"momentum_buffer"}
        buffer = state["state"][i]["momentum_buffer"]
        assert (buffer.shape, buffer.dtype, buffer.device) == (p.shape, p.dtype, p.device)
        assert not buffer.requires_grad
        assert buffer.stride() == p.stride()
    assert set(SGD([Parameter(torch.ones(1))]).param_groups[0]) <= set(state["param_groups"][0])


def test_without_momentum_there_is_no_state(backend: Backend) -> None:
    model = Network()
    optimizer = SparseOpt(model.parameters(), lr=0.1, masks=Masks(model), backend=backend.name)
    run(model, optimizer, range(2))
    assert optimizer.state_dict()["state"] == {}


@pytest.mark.same_bits_as_sgd
@each_hyper
@pytest.mark.parametrize("start", ["SGD", "SparseOpt"])
def test_checkpoint_goes_to_the_other_optimizer_mid_run(backend: Backend, start: str, hyper: dict) -> None:
    def make(name: str, model: Network) -> torch.optim.Optimizer:
        if name == "SGD":
            return SGD(model.parameters(), **hyper, foreach=False)
        return SparseOpt(model.parameters(), **hyper, backend=backend.name)

    straight, switched = Network(), Network()
    run(straight, make("SGD", straight), range(12))

    first = make(start, switched)
    run(switched, first, range(6))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = make("SparseOpt" if start == "SGD" else "SGD", switched)
    second.load_state_dict(torch.load(file, weights_only=True))
    run(switched, second, range(6, 12))
    assert_same(straight, switched)


@pytest.mark.same_bits_as_sgd
@each_hyper
def test_masked_checkpoints_go_both_ways(backend: Backend, hyper: dict) -> None:
    """Masked SGD written by hand, three steps of each in turn, equals correction="none" all the way."""

    class ByHand(SGD):
        masks: dict[Parameter, Tensor]

        def step(self, closure: Any = None) -> Any:
            for p, mask in self.masks.items():
                assert p.grad is not None
                p.grad.mul_(mask)
            super().step(closure)
            with torch.no_grad():
                for p, mask in self.masks.items():
                    p.mul_(mask)

    def make(name: str, model: Network) -> torch.optim.Optimizer:
        if name == "hand":
            optimizer = ByHand(model.parameters(), **hyper, foreach=False)
            optimizer.masks = model.masks_dict()
            return optimizer
        return SparseOpt(
            model.parameters(), **hyper, masks=Masks(model), correction="none", backend=backend.name
        )

    straight, switched = Network(), Network()
    run(straight, make("hand", straight), range(12))
    state = None
    for i, name in enumerate(["hand", "ours", "hand", "ours"]):
        optimizer = make(name, switched)
        if state is not None:
            optimizer.load_state_dict(state)
        run(switched, optimizer, range(3 * i, 3 * i + 3))
        state = copy.deepcopy(optimizer.state_dict())
    for p, q in zip(straight.parameters(), switched.parameters(), strict=True):
        assert torch.equal(p, q)


@each_hyper
@pytest.mark.parametrize("into", ["new", "running"])
@each_mapping
def test_save_and_load_mid_run(backend: Backend, mapping: str, into: str, hyper: dict) -> None:
    """Masks change before and after the checkpoint; a load into an optimizer that is running forgets all."""
    extra: dict[str, Any] = {"ham_alpha": 2.0, "correction": "unnormalized", "max_grad_norm": 0.5}

    def make(model: Network) -> SparseOpt:
        return SparseOpt(
            model.parameters(), **hyper, **extra, masks=model.masks(mapping), backend=backend.name
        )

    def moving_masks(model: Network, optimizer: SparseOpt, steps: range) -> None:
        for step in steps:
            if step % 3 == 1 and mapping != "no-mask":
                generator = torch.Generator().manual_seed(step)
                model[0].weight_mask.copy_(pattern_mask("half", (9, 13), generator))
            model.set_grads(step)
            optimizer.step()

    straight = Network()
    whole = make(straight)
    moving_masks(straight, whole, range(12))

    model = Network()
    first = make(model)
    moving_masks(model, first, range(6))
    files = [io.BytesIO(), io.BytesIO()]
    torch.save(model.state_dict(), files[0])
    torch.save(first.state_dict(), files[1])
    if into == "new":
        model = Network(seed=5)
        second = make(model)
    else:
        second = first
        moving_masks(model, first, range(6, 9))
    targets: tuple[Any, ...] = (model, second)
    for target, file in zip(targets, files, strict=True):
        file.seek(0)
        target.load_state_dict(torch.load(file, weights_only=True))
    moving_masks(model, second, range(6, 12))
    assert_same(straight, model)
    assert_same_state(whole, second)


def test_loading_an_sgd_checkpoint_keeps_what_sgd_does_not_know() -> None:
    model = Network()
    own = {"correction": "none", "ham_alpha": 2.0, "ham_beta": 0.5, "max_grad_norm": 3.0}
    optimizer = SparseOpt(
        [{"params": model[0].parameters(), **own}, {"params": model[2].parameters(), "ham_alpha": 7.0}]
    )
    sgd = SGD([{"params": model[0].parameters()}, {"params": model[2].parameters()}], lr=0.25, momentum=0.5)
    optimizer.load_state_dict(sgd.state_dict())
    assert [g["lr"] for g in optimizer.param_groups] == [0.25, 0.25]
    assert {key: optimizer.param_groups[0][key] for key in own} == own
    assert optimizer.param_groups[1]["ham_alpha"] == 7.0
    assert optimizer.param_groups[1]["correction"] == "layer"


def test_our_checkpoint_brings_our_hyperparameters() -> None:
    p = Parameter(torch.ones(2))
    saved = SparseOpt([p], correction="none", ham_alpha=2.0, max_grad_norm=3.0).state_dict()
    optimizer = SparseOpt([p])
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["correction"] == "none"
    assert optimizer.param_groups[0]["ham_alpha"] == 2.0
    assert optimizer.param_groups[0]["max_grad_norm"] == 3.0


def test_old_checkpoints_load(backend: Backend) -> None:
    """Of the days when SGD had fewer options, and a buffer of None before the first step."""
    model, other = Network(), Network()
    old = {
        "state": {i: {"momentum_buffer": None} for i in range(4)},
        "param_groups": [
            {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.0, "nesterov": False}
            | {"params": [0, 1, 2, 3]}
        ],
    }
    optimizer = SparseOpt(model.parameters(), masks=Masks(model), backend=backend.name)
    optimizer.load_state_dict(old)
    run(model, optimizer, range(3))
    fresh = SparseOpt(
        other.parameters(), lr=0.1, momentum=0.9, dampening=0.5, masks=Masks(other), backend=backend.name
    )
    run(other, fresh, range(3))
    assert_same(model, other)
    assert_same_state(optimizer, fresh)


def test_a_checkpoint_that_does_not_fit_changes_nothing(backend: Backend) -> None:
    model = Network()
    optimizer = SparseOpt(model.parameters(), lr=0.1, momentum=0.9, masks=Masks(model), backend=backend.name)
    run(model, optimizer, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizer.load_state_dict(SparseOpt([Parameter(torch.ones(2))]).state_dict())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for i, entry in before["state"].items():
        assert same_bits(entry["momentum_buffer"], after["state"][i]["momentum_buffer"])
