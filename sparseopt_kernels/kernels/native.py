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
from .memory import Order, is_walkable, laid_out, memory_grid, memory_order, ordered_mask

_MISSING: str | None = None
try:
    import sparseopt_kernels._native as _native
except ModuleNotFoundError:
    _MISSING = "the native library was not built"
except ImportError as error:
    _MISSING = f"the native library cannot be loaded ({error})"

_DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


def build_info() -> dict[str, Any]:
    """What the native library was built with: ``{"native": False, "reason": ...}`` without it, else its
    ``compiler``, whether it has ``openmp`` and ``cuda``, and ``isas``, the instruction sets of its CPU
    kernels that this processor can run."""
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
    _call(_native.step, batch)
    for i in batch.plan.elsewhere:
        reference.update(batch, i)


def squared_norm(batch: Batch) -> Tensor:
    total = torch.tensor(_call(_native.squared_norm, batch), dtype=torch.float64)
    for i in batch.plan.elsewhere:
        total += reference.squared_norm_of(batch, i)
    return total


class _EntryPlan(NamedTuple):
    """The native form of an entry."""

    dtype: torch.dtype
    order: Order
    tensor: Any  # _native.Tensor; None: not for this backend


class _BatchPlan(NamedTuple):
    """The native form of a batch."""

    table: Any  # _native.Table
    entries: list[Entry]  # those in the table
    here: list[int]  # where they are in the batch
    elsewhere: list[int]  # where those are that the reference backend must update
    dtypes: list[torch.dtype]  # of all gradients
    row_major: bool  # whether all entries are


def _call(function: Callable[..., Any], batch: Batch) -> Any:
    """Call the library for all entries that it can update."""
    plan: _BatchPlan = batch.plan
    if plan is None or [grad.dtype for grad in batch.grads] != plan.dtypes:
        plan = batch.plan = _plan_batch(batch)
    grads = [batch.grads[i] for i in plan.here] if plan.elsewhere else batch.grads
    if not (plan.row_major and all(map(Tensor.is_contiguous, grads))):
        grads = [laid_out(grad, e, e.plan.order) for grad, e in zip(grads, plan.entries, strict=True)]
    return function(
        plan.table,
        list(map(Tensor.data_ptr, grads)),
        [_native_rule(rule) for rule in batch.rules],
        [entry.first_step for entry in plan.entries],
        [entry.stale for entry in plan.entries],
        torch.get_num_threads(),
    )


def _plan_batch(batch: Batch) -> _BatchPlan:
    dtype = batch.entries[0].parameter.dtype
    here: list[int] = []
    elsewhere: list[int] = []
    for i, (entry, grad) in enumerate(zip(batch.entries, batch.grads, strict=True)):
        if entry.plan is None or entry.plan.dtype is not dtype:
            entry.plan = _plan_entry(entry)
        (elsewhere if entry.plan.tensor is None or grad.dtype is not dtype else here).append(i)
    entries = [batch.entries[i] for i in here]
    table = _native.Table([entry.plan.tensor for entry in entries], [entry.group for entry in entries])
    row_major = all(entry.plan.order is None for entry in entries)
    return _BatchPlan(table, entries, here, elsewhere, [g.dtype for g in batch.grads], row_major)


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
    dtype = _DTYPES.get(parameter.dtype)
    if dtype is None or not is_walkable(entry, order):
        return _EntryPlan(parameter.dtype, None, None)
    mask = None
    if entry.mask is not None:
        grid = memory_grid(entry, order)
        if grid is None:
            return _EntryPlan(parameter.dtype, None, None)
        ordered = ordered_mask(entry, order)
        mask = _native.PackedMask(ordered.data_ptr(), *grid)
    addresses = (parameter.data_ptr(), 0 if buffer is None else buffer.data_ptr())
    return _EntryPlan(
        parameter.dtype, order, _native.Tensor(dtype, *addresses, parameter.numel(), entry.ham, mask)
    )
