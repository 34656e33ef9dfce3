"""PyTorch's own description of an optimizer under test, and its inputs, made for SparseOpt."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from backends import INTERPRETED
from torch import Tensor

from sparseopt_kernels.optimizer import SparseOpt

common = pytest.importorskip("torch.testing._internal.common_optimizers")

try:
    SGD_INFO = next(info for info in common.optim_db if info.optim_cls is torch.optim.SGD)
    OptimizerInput, OptimizerErrorEnum = common.OptimizerInput, common.OptimizerErrorEnum
except (AttributeError, StopIteration):
    pytest.skip("PyTorch's private description of optimizers has moved", allow_module_level=True)


def inputs(device: str, dtype: torch.dtype | None = None) -> list[Any]:
    """What SGD is tested with, and our own hyperparameters."""
    return [
        *SGD_INFO.optim_inputs_func(device=device),
        OptimizerInput(
            params=None, kwargs={"momentum": 0.9, "correction": "unnormalized"}, desc="unnormalized"
        ),
        OptimizerInput(params=None, kwargs={"correction": "none"}, desc="uncorrected"),
        OptimizerInput(params=None, kwargs={"lr": 1e-2, "ham_alpha": 2.0, "ham_beta": 0.1}, desc="HAM"),
        OptimizerInput(params=None, kwargs={"lr": 1e-2, "max_grad_norm": 1.0}, desc="norm limit"),
    ]


INFO = common.OptimizerInfo(
    SparseOpt,
    optim_inputs_func=inputs,
    scheduler_inputs=SGD_INFO.scheduler_inputs,
    optim_error_inputs_func=SGD_INFO.optim_error_inputs_func,
    supported_impls=("foreach", "fused"),
    supports_sparse=True,
    supports_complex=True,
    supports_fused_on=("cpu",),
)

INPUTS = INFO.optim_inputs_func(device="cpu")
if INTERPRETED:  # the oracle has all rules, and the interpreter is slow
    INPUTS = INPUTS[::2]
each_input = pytest.mark.parametrize("given", INPUTS, ids=[i.desc.replace(" ", "-") for i in INPUTS])
each_masking = pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])


def keyword_arguments(given: Any) -> dict[str, Any]:
    """A copy, for a tensor learning rate is shared with the optimizer."""
    return copy.deepcopy(given.kwargs)


def closure_loss(optimizer: SparseOpt, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = (weight.mv(x) + bias).pow(2).sum()
    loss.backward()
    return loss
