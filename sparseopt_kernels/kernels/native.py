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
from .contract import Entry, Rule

try:
    from .. import _native
except ImportError as error:
    _native = None  # type: ignore[assignment]
    _IMPORT_ERROR = str(error)

_DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


def build_info() -> dict[str, Any]:
    """What the native library was built with: ``{"native": False, "reason": ...}`` without it, else its
    ``compiler``, whether it has ``openmp`` and ``cuda``, and ``isas``, the instruction sets of its CPU
    kernels that this processor can run (the first is used)."""
    if _native is None:
        return {"native": False, "reason": _IMPORT_ERROR}
    return {"native": True, **_native.build_info(), "isas": available_isas()}


def available_isas() -> tuple[str, ...]:
    """The instruction sets this processor can run, the best first. The environment variable
    ``SPARSEOPT_CPU_ISA`` names another one than the first."""
    return () if _native is None else tuple(_native.available_isas())


def unavailable(device_type: str) -> str | None:
    if device_type != "cpu":
        return f"it updates tensors on the cpu, not on {device_type}"
    if _native is None:
        return (
            f"the native library is missing ({_IMPORT_ERROR}): install a C++ compiler, then run "
            "pip install --force-reinstall --no-deps sparseopt_kernels"
        )
    return None


def step(entries: list[Entry]) -> None:
    _, elsewhere = _call(_native.step, entries)
    reference.step(elsewhere)


def squared_norm(entries: list[Entry]) -> float:
    norm, elsewhere = _call(_native.squared_norm, entries)
    return float(norm) + reference.squared_norm(elsewhere)


class _Plan(NamedTuple):
    """The native form of an entry, good for as long as its memory stays where it is."""

    addresses: tuple[int, int]
    order: tuple[int, ...] | None  # of the dimensions in memory; None: as they are
    tensor: Any  # _native.Tensor; None: not for this backend


def _call(function: Callable[..., Any], entries: list[Entry]) -> tuple[Any, list[Entry]]:
    """Call the library for all entries it can update; return its result and the other entries."""
    tensors, grads, rules, first_steps, stale = [], [], [], [], []
    elsewhere = []
    native_rules: dict[int, Any] = {}
    for entry in entries:
        plan = entry.plan
        buffer = entry.momentum_buffer
        addresses = (entry.parameter.data_ptr(), 0 if buffer is None else buffer.data_ptr())
        if plan is None or plan.addresses != addresses:
            plan = entry.plan = _plan(entry, addresses)
            entry.stale = True
        grad = entry.grad
        if plan.tensor is None or grad.layout is not torch.strided or grad.dtype != entry.parameter.dtype:
            elsewhere.append(entry)
            continue
        if not _in_order(grad, plan.order):
            grad = torch.empty_like(entry.parameter).copy_(grad)
        rule = entry.rule
        native_rule = native_rules.get(id(rule))
        if native_rule is None:
            native_rule = native_rules[id(rule)] = _native_rule(rule)
        tensors.append(plan.tensor)
        grads.append(grad)  # a copy has to live until the call is over
        rules.append(native_rule)
        first_steps.append(entry.first_step)
        stale.append(entry.stale)
    addresses_of_grads = [grad.data_ptr() for grad in grads]
    result = function(tensors, addresses_of_grads, rules, first_steps, stale, torch.get_num_threads())
    return result, elsewhere


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


def _plan(entry: Entry, addresses: tuple[int, int]) -> _Plan:
    parameter, buffer = entry.parameter, entry.momentum_buffer
    order = None if parameter.is_contiguous() else _memory_order(parameter)
    dtype = _DTYPES.get(parameter.dtype)
    if dtype is None or not _in_order(parameter, order) or not (buffer is None or _in_order(buffer, order)):
        return _Plan(addresses, None, None)
    mask = None
    if entry.mask is not None:
        grid = _memory_grid(entry, order)
        if grid is None:
            return _Plan(addresses, None, None)
        ordered = entry.mask if order is None else entry.mask.permute(order)
        ordered = ordered.contiguous()
        mask = _native.PackedMask(ordered.data_ptr(), *grid)
    tensor = _native.Tensor(dtype, *addresses, parameter.numel(), entry.ham, mask)
    return _Plan(addresses, order, tensor)


def _memory_order(tensor: Tensor) -> tuple[int, ...]:
    """The dimensions from the largest stride to the smallest: (0, 2, 3, 1) for channels_last."""
    return tuple(sorted(range(tensor.ndim), key=lambda dim: (-tensor.stride(dim), dim)))


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
