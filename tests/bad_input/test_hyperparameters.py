"""Hyperparameters that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends import Backend
from refusals import weights, words

from sparseopt_kernels.optimizer import SparseOpt

NUMBERS = ["lr", "momentum", "dampening", "weight_decay", "ham_alpha", "ham_beta", "max_grad_norm"]
BAD_NUMBERS = [-0.1, float("nan"), float("-inf")]
HYPERPARAMETERS = [
    *(pytest.param({n: v}, words(n, str(v), "must be"), id=f"{n}={v}") for n in NUMBERS for v in BAD_NUMBERS),
    *(pytest.param({n: float("inf")}, words(n, "inf", "must be"), id=f"{n}=inf") for n in NUMBERS[:-1]),
    pytest.param({"max_grad_norm": 0.0}, words("max_grad_norm", "0", "must be"), id="max_grad_norm=0"),
    pytest.param({"lr": torch.tensor(-1.0)}, words("lr", "-1", "must be"), id="tensor-lr-negative"),
    pytest.param({"lr": torch.tensor(float("nan"))}, words("lr", "nan", "must be"), id="tensor-lr-nan"),
    pytest.param({"lr": torch.ones(2)}, words("lr", "2", "one"), id="tensor-lr-of-two"),
    pytest.param({"nesterov": True}, words("nesterov", "momentum"), id="nesterov-without-momentum"),
    pytest.param(
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
        words("nesterov", "dampening"),
        id="nesterov-with-dampening",
    ),
    pytest.param(
        {"correction": "neuron"},
        words("correction", "'neuron'", "'layer'", "'unnormalized'", "'none'"),
        id="correction=neuron",
    ),
    pytest.param({"correction": None}, words("correction", "None", "'layer'"), id="correction=None"),
]


@pytest.mark.parametrize(("hyper", "message"), HYPERPARAMETERS)
def test_hyperparameters(hyper: dict[str, Any], message: str) -> None:
    """Of all groups, of one group, and of a group that comes later, which then is not there."""
    a, b, c = weights()
    with pytest.raises(ValueError, match=message):
        SparseOpt([a], **hyper)
    with pytest.raises(ValueError, match=message):
        SparseOpt([{"params": [a]}, {"params": [b], **hyper}])
    optimizer = SparseOpt([a])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [c], **hyper})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [c]})


def test_differentiable() -> None:
    a, b = weights(2)
    with pytest.raises(RuntimeError, match="differentiable=True"):
        SparseOpt([a], differentiable=True)
    groups: list[dict[str, Any]] = [{"params": [a]}, {"params": [b], "differentiable": True}]
    with pytest.raises(RuntimeError, match="differentiable=True"):
        SparseOpt(groups)


def test_fused_and_foreach_together() -> None:
    with pytest.raises(RuntimeError, match=words("fused", "foreach")):
        SparseOpt(weights(1), fused=True, foreach=True)


@pytest.mark.parametrize(
    "flags", [{"fused": True}, {"foreach": True}, {"fused": False, "foreach": False}], ids=str
)
def test_fused_or_foreach_are_accepted(backend: Backend, flags: dict[str, Any]) -> None:
    (p,) = weights(1)
    p.grad = torch.ones_like(p)
    optimizer = SparseOpt([p], **flags, backend=backend.name)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    assert not p.grad.any()


@pytest.mark.parametrize("name", ["momentum", "weight_decay", "max_grad_norm"])
def test_a_tensor_of_two_is_no_number(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} is tensor\(\[1., 1.\]\), it must be a"):
        SparseOpt([{"params": weights(1), name: torch.ones(2)}])


@pytest.mark.parametrize("name", ["lr", "momentum", "dampening", "weight_decay", "ham_alpha", "ham_beta"])
@pytest.mark.parametrize("value", ["0.1", None])
def test_a_hyperparameter_that_is_no_number(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name} is {value!r}, it must be a finite number >= 0"):
        SparseOpt(weights(1), **{name: value})


@pytest.mark.parametrize(("name", "value"), [("masks", {}), ("backend", "cpu"), ("feeding_norm", {})])
def test_a_group_with_what_is_one_for_all(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"a parameter group has '{name}'"):
        SparseOpt([{"params": weights(1), name: value}], backend="reference")


def test_integers_are_numbers(backend: Backend) -> None:
    """And so is whatever has ``__float__``."""
    p, q = torch.ones(3, 4, requires_grad=True), torch.ones(3, 4, requires_grad=True)
    numbers = {"lr": 1, "momentum": 0, "dampening": 0, "weight_decay": 1, "ham_alpha": 1, "ham_beta": 0}
    for parameter, kind in ((p, int), (q, float)):
        parameter.grad = torch.full((3, 4), 0.25)
        given: dict[str, Any] = {name: kind(number) for name, number in numbers.items()}
        SparseOpt([parameter], **given, max_grad_norm=kind(1), backend=backend.name).step()
    assert torch.equal(p, q)
