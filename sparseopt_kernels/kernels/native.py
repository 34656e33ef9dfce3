"""The native CPU backend: C++ with OpenMP over rows (``csrc/cpu``), one call for all parameters.

Here is what PyTorch knows and the library does not: where tensors lie, and whether their memory is laid
out as the loops expect. Tensors that are not are handed to the reference backend.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .contract import Batch, Entry, Rule

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


def unavailable(device_type: str) -> str | None:
    if device_type != "cpu":
        return f"it updates tensors on the cpu, not on {device_type}"
    if _MISSING:
        return f"{_MISSING}: install a C++ compiler, then install sparseopt_kernels again"
    return None


def step(batch: Batch) -> None:
    _call(_native.step, batch)
    for i in batch.plan.elsewhere:
        entry = batch.entries[i]
        reference.update(entry, batch.grads[i], batch.rules[entry.group])


def squared_norm(batch: Batch) -> float:
    norm = float(_call(_native.squared_norm, batch))
    for i in batch.plan.elsewhere:
        entry = batch.entries[i]
        norm += reference.squared_norm_of(entry, batch.grads[i], batch.rules[entry.group])
    return norm


class _EntryPlan(NamedTuple):
    """The native form of an entry."""

    dtype: torch.dtype
    order: tuple[int, ...] | None  # of the dimensions in memory; None: as they are
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
        grads = [_laid_out(grad, entry) for grad, entry in zip(grads, plan.entries, strict=True)]
    return function(
        plan.table,
        list(map(Tensor.data_ptr, grads)),
        [_native_rule(rule) for rule in batch.rules],
        [entry.first_step for entry in plan.entries],
        [entry.stale for entry in plan.entries],
        torch.get_num_threads(),
    )


def _laid_out(grad: Tensor, entry: Entry) -> Tensor:
    """The gradient, or a copy of it in the parameter's memory format."""
    if _in_order(grad, entry.plan.order):
        return grad
    return torch.empty_like(entry.parameter).copy_(grad)


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
    order = None if parameter.is_contiguous() else _memory_order(parameter)
    dtype = _DTYPES.get(parameter.dtype)
    if dtype is None or not _in_order(parameter, order):
        return _EntryPlan(parameter.dtype, None, None)
    if buffer is not None and (buffer.dtype != parameter.dtype or not _in_order(buffer, order)):
        return _EntryPlan(parameter.dtype, None, None)
    mask = None
    if entry.mask is not None:
        grid = _memory_grid(entry, order)
        if grid is None:
            return _EntryPlan(parameter.dtype, None, None)
        ordered = entry.mask if order is None else entry.mask.permute(order)
        ordered = ordered.contiguous()
        mask = _native.PackedMask(ordered.data_ptr(), *grid)
    addresses = (parameter.data_ptr(), 0 if buffer is None else buffer.data_ptr())
    return _EntryPlan(
        parameter.dtype, order, _native.Tensor(dtype, *addresses, parameter.numel(), entry.ham, mask)
    )


def _memory_order(tensor: Tensor) -> tuple[int, ...]:
    """The dimensions from the largest stride to the smallest: (0, 2, 3, 1) for channels_last."""
    strides = tensor.stride()
    return tuple(sorted(range(tensor.ndim), key=lambda dim: (-strides[dim], dim)))


def _in_order(tensor: Tensor, order: tuple[int, ...] | None) -> bool:
    """Whether the memory of ``tensor`` is its dimensions in ``order``, without gaps."""
    return tensor.is_contiguous() if order is None else tensor.permute(order).is_contiguous()


def _memory_grid(entry: Entry, order: tuple[int, ...] | None) -> tuple[int, int, int, int] | None:
    """``Neurons.grid`` of the tensor as it lies in memory; None where groups are not whole runs there."""
    shape, neurons = entry.parameter.shape, entry.neurons
    if order is None:
        return neurons.grid(shape)
    if neurons.groups > 1 and order[0] != 0:
        return None
    position = order.index(neurons.dim)
    before = prod(shape[dim] for dim in order[:position])
    after = prod(shape[dim] for dim in order[position + 1 :])
    return neurons.groups, before // neurons.groups, shape[neurons.dim], after
