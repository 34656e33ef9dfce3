"""Parameters that are refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from backends import Backend
from refusals import weights
from side_by_side import same_bits

from sparseopt_kernels.optimizer import SparseOpt


def test_a_parameter_in_two_groups() -> None:
    a, b, _ = weights()
    already = (
        r"params\[0\] of the new group is in the optimizer already, as param_groups\[0\]\['params'\]\[1\]"
    )
    with pytest.raises(ValueError, match=already):
        SparseOpt([{"params": [a, b]}, {"params": [b]}])
    optimizer = SparseOpt([a])
    with pytest.raises(ValueError, match="is in the optimizer already"):
        optimizer.add_param_group({"params": [a]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("named", [False, True], ids=["tensors", "named"])
def test_a_parameter_twice_in_a_group(backend: Backend, named: bool) -> None:
    """Tied weights: PyTorch warns, and the parameter is updated once."""
    a, b = weights(2)
    other = copy.deepcopy(b)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        twice = SparseOpt(
            [("a", a), ("b", b), ("c", b)] if named else [a, b, b], lr=0.1, momentum=0.9, backend=backend.name
        )
    once = SparseOpt([other], lr=0.1, momentum=0.9, backend=backend.name)
    for _ in range(3):
        for p in (a, b, other):
            p.grad = torch.ones_like(p)
        twice.step()
        once.step()
    assert same_bits(b, other)
    assert len(twice.param_groups[0]["params"]) == 3
    assert [*twice.state_dict()["state"]] == [0, 2]


def test_no_parameters() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        SparseOpt([])


@pytest.mark.parametrize(
    "params", [torch.ones(2), [1.0], [{"params": {torch.ones(2)}}]], ids=["tensor", "float", "set"]
)
def test_not_parameters(params: Any) -> None:
    with pytest.raises(TypeError):
        SparseOpt(params)


def test_a_parameter_that_is_no_leaf() -> None:
    (a,) = weights(1)
    with pytest.raises(ValueError, match="non-leaf"):
        SparseOpt([a * 2])
