"""What autograd and inference mode see of a step."""

from __future__ import annotations

import pytest
import torch
from backends import Backend
from side_by_side import same_bits
from torch import nn
from torch.nn.parameter import Parameter
from watched import give_gradient, masked_layer, random_mask, settled

from sparseopt_kernels.masks.mapping import Masks
from sparseopt_kernels.optimizer import SparseOpt


def test_autograd_notices_the_update(backend: Backend) -> None:
    """A backward pass through a weight that a step has changed is an error, not a wrong gradient."""
    layer, optimizer = settled(backend)
    x = torch.randn(3, 517, requires_grad=True)
    loss = layer(x).sum()
    version = layer.weight._version
    optimizer.step()
    assert layer.weight._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_steps_in_inference_mode(backend: Backend) -> None:
    """A step there, the first one too, leaves parameters and buffers that steps elsewhere go on from."""
    results = []
    for inference in (False, True):
        layer = masked_layer()
        optimizer = SparseOpt(
            layer.parameters(), lr=0.1, momentum=0.9, masks=Masks(layer), backend=backend.name
        )
        for step in range(4):
            give_gradient(layer, step)
            with torch.inference_mode(inference and step != 2):
                optimizer.step()
        results.append((layer.weight, optimizer.state[layer.weight]["momentum_buffer"]))
    for a, b in zip(*results, strict=True):
        assert not b.is_inference()
        assert same_bits(a, b)


def test_only_updated_parameters_change_version(backend: Backend) -> None:
    a, b, c = (Parameter(torch.ones(3, 4)) for _ in range(3))
    a.grad, c.grad = torch.ones(3, 4), torch.ones(3, 4)
    optimizer = SparseOpt([a, b, c], lr=0.1, masks={c: random_mask((3, 4))}, backend=backend.name)
    versions = [p._version for p in (a, b, c)]
    optimizer.step()
    changed = [p._version > v for p, v in zip((a, b, c), versions, strict=True)]
    assert changed == [True, False, True]


def test_parameters_stay_leaves(backend: Backend) -> None:
    layer, optimizer = settled(backend)
    assert layer.weight.is_leaf
    assert layer.weight.requires_grad
    assert layer.weight.grad_fn is None
    assert not optimizer.state[layer.weight]["momentum_buffer"].requires_grad


def test_frozen_parameter_with_a_gradient_is_updated_as_sgd_does(backend: Backend) -> None:
    p, q = (torch.ones(4) for _ in range(2))
    p.grad, q.grad = torch.ones(4), torch.ones(4)
    SparseOpt([p], lr=0.5, backend=backend.name).step()
    torch.optim.SGD([q], lr=0.5).step()
    assert torch.equal(p, q)


def test_a_weight_shared_by_two_layers(backend: Backend) -> None:
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model[1].weight = model[0].weight
    mask = random_mask((6, 6))
    model[0].register_buffer("weight_mask", mask)
    optimizer = SparseOpt(model.parameters(), lr=0.1, masks=Masks(model), backend=backend.name)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).sum().backward()
        optimizer.step()
    assert not model.get_parameter("1.weight")[~mask].any()
