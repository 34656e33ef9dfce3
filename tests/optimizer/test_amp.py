"""Automatic mixed precision."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from backends import Backend
from network import Network, assert_same, each_mapping, run
from side_by_side import same_bits
from torch.nn.parameter import Parameter

from sparseopt_kernels.masks.mapping import Masks
from sparseopt_kernels.optimizer import SparseOpt


def test_grad_scaler_finds_what_it_looks_for() -> None:
    assert SparseOpt._step_supports_amp_scaling is True
    assert "grad_scaler" not in inspect.signature(SparseOpt.step).parameters


@each_mapping
@pytest.mark.parametrize("unscale", [False, True], ids=["fused", "unscaled"])
def test_grad_scaler_equals_no_scaler(backend: Backend, mapping: str, unscale: bool) -> None:
    """A power of two scales without rounding: to the bit, with an overflow on the first step and later."""
    models = [Network(torch.float32), Network(torch.float32)]
    for model in models:
        optimizer = SparseOpt(
            model.parameters(),
            lr=0.1,
            momentum=0.9,
            dampening=0.5,
            max_grad_norm=0.5,
            masks=model.masks(mapping),
            backend=backend.name,
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(8):
            overflow = step in (0, 1, 4)
            if model is models[0]:
                if not overflow:
                    run(model, optimizer, range(step, step + 1))
                continue
            scale = scaler.get_scale()
            model.set_grads(step, scale)
            scaler.scale(torch.ones(()))
            if overflow:
                model[2].weight.grad[0, 0] = torch.inf
            state = copy.deepcopy(list(model.parameters())), started(optimizer)
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            assert scaler.get_scale() == (scale / 2 if overflow else scale)
            assert not hasattr(optimizer, "grad_scale")
            if overflow:
                for p, q in zip(model.parameters(), state[0], strict=True):
                    assert same_bits(p, q)
                assert started(optimizer) == state[1]
    assert_same(*models)


@each_mapping
def test_unscale_and_clip(backend: Backend, mapping: str) -> None:
    """The gradients a user has unscaled and clipped are taken as they are."""
    models = [Network(torch.float32), Network(torch.float32)]
    for model in models:
        optimizer = SparseOpt(
            model.parameters(), lr=0.1, momentum=0.9, masks=model.masks(mapping), backend=backend.name
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=model is models[1])
        for step in range(4):
            model.set_grads(step, scaler.get_scale())
            scaler.scale(torch.ones(()))
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            scaler.step(optimizer)
            scaler.update()
    assert_same(*models)


def started(optimizer: SparseOpt) -> set[int]:
    """The parameters that made their first step: where the verdict of AMP stays on the device, a momentum
    buffer of zeros may be there before it."""
    state = optimizer.state_dict()["state"]
    return {i for i, own in state.items() if own["momentum_buffer"].any()}


@pytest.mark.parametrize("found_inf", [1.0, 2.0, 0.5])
def test_found_inf_leaves_everything_as_it_was(backend: Backend, found_inf: float) -> None:
    """It is a sum over devices, so any value but 0 counts: no weight, no state, no first step. Only a mask
    that changed is applied all the same."""
    model = Network()
    optimizer: Any = SparseOpt(
        model.parameters(), lr=0.1, momentum=0.9, masks=Masks(model), backend=backend.name
    )
    model.set_grads(0)
    before = copy.deepcopy(model)
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(found_inf), torch.tensor(8.0)
    assert optimizer.step() is None
    assert optimizer.step(lambda: 3.5) == 3.5
    assert_same(model, before)
    assert not started(optimizer)
    del optimizer.found_inf, optimizer.grad_scale

    run(model, optimizer, range(2))
    optimizer.found_inf = torch.tensor(found_inf)
    model[0].weight_mask[0].logical_not_()
    before, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    outside = ~model[0].weight_mask
    for masked in (before[0].weight.data, state["state"][0]["momentum_buffer"]):
        assert masked[outside].any()
        masked[outside] = 0.0
    assert_same(model, before)
    for i, entry in state["state"].items():
        assert same_bits(entry["momentum_buffer"], optimizer.state_dict()["state"][i]["momentum_buffer"])


def test_a_group_added_after_a_first_step_that_was_skipped(backend: Backend) -> None:
    """The next step of the others is still their first: dampening does not touch it."""
    p, q = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    p.grad, q.grad = torch.ones(3), torch.ones(3)
    optimizer: Any = SparseOpt([p], lr=1.0, momentum=0.9, dampening=0.5, backend=backend.name)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.add_param_group({"params": [q]})
    optimizer.step()
    assert p.tolist() == q.tolist() == [0.0] * 3
    optimizer.step()
    assert p.tolist() == q.tolist() == pytest.approx([-1.4] * 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_parameters_under_a_scaler(backend: Backend, dtype: torch.dtype) -> None:
    model = Network(dtype)
    optimizer = SparseOpt(model.parameters(), lr=0.05, momentum=0.9, masks=Masks(model), backend=backend.name)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    losses = []
    for _ in range(15):
        losses.append(model.set_grads(0, scaler.get_scale()).item())
        scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        scaler.update()
    assert losses[-1] < 0.8 * losses[0]
    assert all(not p[~mask].any() for p, mask in model.masks_dict().items())


def test_autocast_trains(backend: Backend) -> None:
    model = Network(torch.float32)
    optimizer = SparseOpt(model.parameters(), lr=0.05, momentum=0.9, masks=Masks(model), backend=backend.name)
    x, y = torch.randn(32, 13), torch.randn(32, 4)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
