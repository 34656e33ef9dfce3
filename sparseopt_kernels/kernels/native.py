"""The native CPU backend: C++ with OpenMP over rows (``csrc/cpu``), one call for all parameters.

Here is what PyTorch knows and the library does not: where tensors lie, and whether their memory is laid
out as the loops expect. Tensors that are not are handed to the reference backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .contract import Batch, Entry, Rule
from .memory import DTYPE_NAMES, Order, Walk, is_walkable, memory_grid, memory_order

_MISSING: str | None = None
try:
    import sparseopt_kernels._native as _native
except ModuleNotFoundError:
    _MISSING = "the native library was not built"
except ImportError as error:
    _MISSING = f"the native library cannot be loaded ({error})"


def build_info() -> dict[str, Any]:
    """What the native library was built with: see ``kernels.build_info``."""
    if _MISSING:
        return {"native": False, "reason": _MISSING}
    return {"native": True, **_native.build_info(), "isas": available_isas()}


def available_isas() -> tuple[str, ...]:
    """The instruction sets this processor can run, the best first. The environment variable
    ``SPARSEOPT_CPU_ISA`` names another one than the first."""
    return () if _MISSING else tuple(_native.available_isas())


def unavailable(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"it updates tensors on the cpu, not on {device.type}"
    if _MISSING:
        return f"{_MISSING}: install a C++ compiler, then install sparseopt_kernels again"
    return None


def host_scalars(device: torch.device) -> bool:
    return True


def step(batch: Batch) -> None:
    for i in _call(_native.step, batch)[1]:
        reference.update(batch, i)


def squared_norm(batch: Batch) -> Tensor:
    norm, elsewhere = _call(_native.squared_norm, batch)
    total = torch.tensor(norm, dtype=torch.float64)
    for i in elsewhere:
        total += reference.squared_norm_of(batch, i)
    return total


class _EntryPlan(NamedTuple):
    """The native form of an entry."""

    dtype: torch.dtype
    order: Order
    tensor: Any  # _native.Tensor, or None

    @property
    def here(self) -> bool:
        return self.tensor is not None


class _BatchPlan(NamedTuple):
    """The native form of a batch."""

    walk: Walk
    table: Any  # _native.Table


def _call(function: Callable[..., Any], batch: Batch) -> tuple[Any, list[int]]:
    """What the library returns for all entries that it can update, and where the others are."""
    plan: _BatchPlan = batch.plan
    if plan is None or not plan.walk.fits(batch):
        plan = batch.plan = _plan_batch(batch)
    entries, grads = plan.walk.entries, plan.walk.grads(batch)
    result = function(
        plan.table,
        list(map(Tensor.data_ptr, grads)),
        [_native_rule(rule) for rule in batch.rules],
        [entry.first_step for entry in entries],
        [entry.stale for entry in entries],
        torch.get_num_threads(),
    )
    return result, plan.walk.elsewhere


def _plan_batch(batch: Batch) -> _BatchPlan:
    for entry in batch.entries:
        if entry.plan is None or entry.plan.dtype is not batch.dtype:
            entry.plan = _plan_entry(entry)
    walk = Walk(batch)
    entries = walk.entries
    return _BatchPlan(walk, _native.Table([e.plan.tensor for e in entries], [e.group for e in entries]))


def _native_rule(rule: Rule) -> Any:
    assert isinstance(rule.lr, float)
    assert isinstance(rule.gamma, float)
    return _native.Rule(
        rule.lr,
        rule.momentum,
        rule.dampening,
        rule.weight_decay,
        rule.nesterov,
        rule.maximize,
        rule.correction,
        rule.ham_alpha,
        rule.ham_beta,
        rule.gamma,
    )


def _plan_entry(entry: Entry) -> _EntryPlan:
    parameter, buffer = entry.parameter, entry.momentum_buffer
    order = memory_order(parameter)
    dtype = DTYPE_NAMES.get(parameter.dtype)
    if dtype is None or not is_walkable(entry, order):
        return _EntryPlan(parameter.dtype, None, None)
    mask = None
    if entry.mask is not None:
        grid = memory_grid(entry, order)
        if grid is None:
            return _EntryPlan(parameter.dtype, None, None)
        ordered = (entry.mask if order is None else entry.mask.permute(order)).contiguous()
        mask = _native.PackedMask(ordered.data_ptr(), *grid)
    addresses = (parameter.data_ptr(), 0 if buffer is None else buffer.data_ptr())
    return _EntryPlan(
        parameter.dtype, order, _native.Tensor(dtype, *addresses, parameter.numel(), entry.ham, mask)
    )
