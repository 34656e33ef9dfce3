"""Parameters that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from refusals import weights

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
def test_a_parameter_twice_in_a_group(named: bool) -> None:
    (a,) = weights(1)
    first, second = (
        ("a", "b") if named else (r"params\[0\] of the new group", r"params\[1\] of the new group")
    )
    with pytest.raises(ValueError, match=f"{second} is in the optimizer already, as {first}"):
        SparseOpt([("a", a), ("b", a)] if named else [a, a])


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
