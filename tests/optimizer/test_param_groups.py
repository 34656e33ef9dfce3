"""Parameter groups: their own values, defaults, parameters that come later or move."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import Backend
from network import Network, assert_same, assert_same_state, run
from side_by_side import pattern_mask, same_bits
from torch.nn.parameter import Parameter
from torch.optim import SGD

from sparseopt_kernels.masks.mapping import Masks
from sparseopt_kernels.optimizer import SparseOpt

OWN_VALUES: dict[str, Any] = {
    "lr": 0.7,
    "momentum": 0.3,
    "dampening": 0.6,
    "weight_decay": 0.4,
    "nesterov": True,
    "maximize": True,
    "correction": "unnormalized",
    "ham_alpha": 3.0,
    "ham_beta": 0.5,
    "max_grad_norm": 0.01,
}


@pytest.mark.parametrize("key", OWN_VALUES)
def test_a_group_has_its_own(backend: Backend, key: str) -> None:
    """A value given for a group does to it what the same value for all does, and nothing to the others."""
    common: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "backend": backend.name}

    # The gradient of one layer depends on the other: train on given gradients, not on a loss.
    def fixed(groups: Callable[[Network], Any], **kwargs: Any) -> Network:
        model = Network()
        optimizer = SparseOpt(groups(model), **(common | kwargs), masks=Masks(model))
        generator = torch.Generator().manual_seed(3)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            optimizer.step()
        return model

    mixed = fixed(
        lambda m: [{"params": m[0].parameters(), key: OWN_VALUES[key]}, {"params": m[2].parameters()}]
    )
    with_it = fixed(lambda m: m.parameters(), **{key: OWN_VALUES[key]})
    without = fixed(lambda m: m.parameters())
    assert_same(mixed[0], with_it[0])
    assert_same(mixed[2], without[2])
    assert not torch.equal(mixed[0].weight, without[0].weight)


def test_groups_take_the_defaults() -> None:
    model = Network()
    groups: list[dict[str, Any]] = [
        {"params": model[0].parameters(), "lr": 0.5},
        {"params": model[2].parameters()},
    ]
    optimizer = SparseOpt(groups)
    first, second = optimizer.param_groups
    assert first["lr"] == 0.5
    assert second == {
        "params": second["params"],
        "lr": 1e-3,
        "momentum": 0.0,
        "dampening": 0.0,
        "weight_decay": 0.0,
        "nesterov": False,
        "maximize": False,
        "correction": "layer",
        "ham_alpha": 0.0,
        "ham_beta": 0.0,
        "max_grad_norm": None,
        "max_grad_norm_over": "active",
        "foreach": None,
        "differentiable": False,
        "fused": None,
    }


def test_signature_is_that_of_sgd() -> None:
    """A drop-in replacement: every argument of SGD, in its place, of its kind and with its default."""
    ours = inspect.signature(SparseOpt).parameters
    theirs = inspect.signature(SGD).parameters
    positional = [n for n, p in theirs.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert list(ours)[: len(positional)] == positional
    for name, parameter in theirs.items():
        assert ours[name].kind == parameter.kind, name
        assert ours[name].default == parameter.default, name


@pytest.mark.parametrize("how", ["tensor", "list", "generator", "named", "named-generator"])
def test_add_param_group_while_running(backend: Backend, how: str) -> None:
    """New parameters, masked or not, begin with their own first step; the others go on."""
    model, other = Network(), Network()
    named = how.startswith("named")
    start = model[0].named_parameters(prefix="0") if named else model[0].parameters()
    masks = model.masks_dict()
    late_mask = masks.pop(model[2].weight)
    optimizer = SparseOpt(start, lr=0.1, momentum=0.9, dampening=0.5, masks=masks, backend=backend.name)
    run(model, optimizer, range(3))

    masks[model[2].weight] = late_mask
    params = {
        "tensor": model[2].weight,
        "list": [model[2].weight],
        "generator": (p for p in [model[2].weight]),
        "named": [("2.weight", model[2].weight)],
        "named-generator": (pair for pair in [("2.weight", model[2].weight)]),
    }[how]
    optimizer.add_param_group({"params": params, "lr": 0.05})
    run(model, optimizer, range(3, 6))
    assert not model[2].weight[~late_mask].any()

    # The same, with the late group there from the start but without gradients at first.
    all_of_it = SparseOpt(
        [{"params": other[0].parameters()}, {"params": [other[2].weight], "lr": 0.05}],
        lr=0.1,
        momentum=0.9,
        dampening=0.5,
        masks=other.masks_dict(),
        backend=backend.name,
    )
    for step in range(6):
        other.set_grads(step)
        if step < 3:
            other[2].weight.grad = None
        all_of_it.step()
    assert_same(model, other)
    assert_same_state(optimizer, all_of_it)


def test_named_parameters_are_kept(backend: Backend) -> None:
    model = Network()
    optimizer = SparseOpt(model.named_parameters(), lr=0.1, masks=Masks(model), backend=backend.name)
    names = ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert optimizer.param_groups[0]["param_names"] == names
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names
    run(model, optimizer, range(2))


def test_a_parameter_replaced_in_its_group(backend: Backend) -> None:
    """Network surgery writes into ``param_groups``: what was known of the former parameter is forgotten."""
    model = Network()
    masks = model.masks_dict()
    optimizer = SparseOpt([model[0].weight, model[2].weight], lr=0.1, masks=masks, backend=backend.name)
    run(model, optimizer, range(2))
    new = Parameter(torch.ones(5, 6, dtype=torch.float64))
    new_mask = pattern_mask("half", (5, 6), torch.Generator().manual_seed(0))
    former = optimizer.param_groups[0]["params"][0]
    optimizer.param_groups[0]["params"][0] = new
    del masks[former]
    masks[new] = new_mask
    new.grad = torch.ones_like(new)
    optimizer.step()
    fresh = Parameter(torch.ones(5, 6, dtype=torch.float64))
    fresh.grad = torch.ones_like(fresh)
    SparseOpt([fresh], lr=0.1, masks={fresh: new_mask}, backend=backend.name).step()
    assert same_bits(new, fresh)


def test_a_parameter_moved_to_another_group(backend: Backend) -> None:
    """Its hyperparameters are those of the group that it is in now."""
    a, b = Parameter(torch.zeros(3)), Parameter(torch.zeros(3))
    groups: list[dict[str, Any]] = [{"params": [a, b]}, {"params": [], "lr": 2.0}]
    optimizer = SparseOpt(groups, lr=1.0, backend=backend.name)
    for p in (a, b):
        p.grad = -torch.ones(3)
    optimizer.step()
    optimizer.param_groups[1]["params"].append(optimizer.param_groups[0]["params"].pop())
    optimizer.step()
    assert a.tolist() == [2.0, 2.0, 2.0]
    assert b.tolist() == [3.0, 3.0, 3.0]
