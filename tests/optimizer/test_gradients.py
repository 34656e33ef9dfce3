"""Gradients that are absent, set to zero or set to None."""

from __future__ import annotations

import copy

import pytest
import torch
from backends import Backend
from network import Network, assert_same, each_mapping, run

from sparseopt_kernels.masks.mapping import Masks
from sparseopt_kernels.optimizer import SparseOpt


@pytest.mark.parametrize("set_to_none", [True, False], ids=["to-none", "to-zero"])
@each_mapping
def test_zero_grad(backend: Backend, mapping: str, set_to_none: bool) -> None:
    """Both ways of it between steps train alike; the memory of a gradient may stay or move."""
    models = [Network(), Network()]
    for model in models:
        optimizer = SparseOpt(
            model.parameters(), lr=0.1, momentum=0.9, masks=model.masks(mapping), backend=backend.name
        )
        for step in range(6):
            x = torch.randn(8, 13, generator=torch.Generator().manual_seed(step)).double()
            if model is models[0]:
                optimizer.zero_grad(set_to_none=set_to_none)
            else:
                for p in model.parameters():
                    p.grad = None
            model(x).square().sum().backward()
            optimizer.step()
    assert_same(*models)


def test_parameters_without_gradient_are_left_alone(backend: Backend) -> None:
    model = Network()
    model[0].requires_grad_(False)
    before = copy.deepcopy(model[0])
    optimizer = SparseOpt(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, masks=Masks(model), backend=backend.name
    )
    run(model, optimizer, range(1))
    versions = [p._version for p in model[0].parameters()]
    run(model, optimizer, range(1, 3))
    assert_same(model[0], before)
    assert [p._version for p in model[0].parameters()] == versions
    assert set(optimizer.state) == set(model[2].parameters())


def test_step_with_no_gradient_at_all(backend: Backend) -> None:
    model = Network()
    before = copy.deepcopy(model)
    optimizer = SparseOpt(model.parameters(), max_grad_norm=1.0, masks=Masks(model), backend=backend.name)
    assert optimizer.step() is None
    assert_same(model, before)
    assert not optimizer.state
