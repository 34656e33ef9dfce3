"""Closures, hooks and the profiler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends import Backend
from network import Network, assert_same, run
from side_by_side import same_bits
from torch.nn.parameter import Parameter

from sparseopt_kernels.masks.mapping import Masks
from sparseopt_kernels.optimizer import SparseOpt


def test_closure_runs_once_with_gradients_and_its_loss_is_returned(backend: Backend) -> None:
    model = Network()
    optimizer = SparseOpt(model.parameters(), lr=0.1, masks=Masks(model), backend=backend.name)
    calls = []

    def closure() -> float:
        assert torch.is_grad_enabled()
        calls.append(model.set_grads(0).item())
        return calls[-1]

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert [loss] == calls
    other = Network()
    run(other, SparseOpt(other.parameters(), lr=0.1, masks=Masks(other), backend=backend.name), range(1))
    assert_same(model, other)
    assert optimizer.step() is None


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_step_runs_without_gradients(backend: Backend) -> None:
    """A gradient that itself requires grad (create_graph) makes no graph of the step."""
    p = Parameter(torch.ones(3))
    (p.square().sum()).backward(create_graph=True)
    assert p.grad is not None
    assert p.grad.requires_grad
    SparseOpt([p], lr=0.25, momentum=0.9, backend=backend.name).step()
    assert p.is_leaf
    assert p.tolist() == [0.5, 0.5, 0.5]


def test_step_hooks(backend: Backend) -> None:
    model = Network()
    optimizer = SparseOpt(model.parameters(), lr=0.1, momentum=0.9, backend=backend.name)
    before = model[0].weight.detach().clone()
    seen = []

    def pre(opt: SparseOpt, args: tuple, kwargs: dict) -> None:
        assert opt is optimizer
        assert same_bits(model[0].weight, before)
        seen.append("pre")

    def post(opt: SparseOpt, args: tuple, kwargs: dict) -> None:
        assert not torch.equal(model[0].weight, before)
        seen.append("post")

    handles = [optimizer.register_step_pre_hook(pre), optimizer.register_step_post_hook(post)]
    model.set_grads(0)
    optimizer.step()
    assert seen == ["pre", "post"]
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert seen == ["pre", "post"]


def test_step_pre_hook_may_change_a_mask(backend: Backend) -> None:
    """How a user may drive dynamic sparse training: the very step that the hook precedes sees the mask."""
    model = Network()
    optimizer = SparseOpt(model.parameters(), lr=0.1, momentum=0.9, masks=Masks(model), backend=backend.name)
    run(model, optimizer, range(2))

    def prune(*_: Any) -> None:
        model[0].weight_mask[1] = False

    optimizer.register_step_pre_hook(prune)
    run(model, optimizer, range(2, 3))
    assert not model[0].weight[1].any()
    assert not optimizer.state[model[0].weight]["momentum_buffer"][1].any()


def test_state_dict_hooks(backend: Backend) -> None:
    model = Network()
    optimizer = SparseOpt(model.parameters(), lr=0.1, backend=backend.name)
    seen = []
    optimizer.register_state_dict_pre_hook(lambda opt: seen.append("pre"))
    optimizer.register_state_dict_post_hook(lambda opt, state: {**state, "more": 7})
    optimizer.register_load_state_dict_pre_hook(lambda opt, state: seen.append(state["more"]))
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["pre", 7, "loaded"]


def test_profiler_names_the_step(backend: Backend) -> None:
    model = Network()
    optimizer = SparseOpt(model.parameters(), lr=0.1, backend=backend.name)
    model.set_grads(0)
    with torch.profiler.profile() as profile:
        optimizer.step()
        optimizer.zero_grad()
    names = {event.key for event in profile.key_averages()}
    assert {"Optimizer.step#SparseOpt.step", "Optimizer.zero_grad#SparseOpt.zero_grad"} <= names
