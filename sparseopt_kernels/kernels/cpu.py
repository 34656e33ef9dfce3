"""The CPU backend: C++ with OpenMP (``csrc/cpu``), one call for all parameters.

Here is what PyTorch knows and the library does not: where tensors lie, and whether their memory is laid out
as the loops expect.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .. import native_library
from ..correction import Factors
from .contract import Inputs, NormOver, ParamState, UnseenWrite
from .derived import Derived
from .memory import (
    DTYPE_NAMES,
    address_of,
    dim_order,
    in_order,
    is_non_overlapping_and_dense,
    mask_in_memory_order,
    memory_grid,
)


def build_info() -> dict[str, Any]:
    """Return what the native library was built with: see ``kernels.build_info``."""
    if native_library.MISSING:
        return {"native": False, "reason": native_library.MISSING}
    return {"native": True, **native_library.build_info(), "isas": available_isas()}


def available_isas() -> tuple[str, ...]:
    """Return the instruction sets that this processor can run, the best first.

    The environment variable ``SPARSEOPT_CPU_ISA`` names another one than the first.
    """
    return () if native_library.MISSING else tuple(native_library.available_isas())


class Cpu:
    def __init__(self) -> None:
        self._packed = Derived(_pack)
        # Of parameters that stay when the mask of another changes, nothing is made again.
        self._tensors: WeakKeyDictionary[ParamState, native_library.Tensor] = WeakKeyDictionary()

    def unavailable(self, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"it updates tensors on the cpu, not on {device.type}"
        if native_library.MISSING:
            return (
                f"{native_library.MISSING}: install a C++ compiler, then sparseopt_kernels again, "
                "then `sparseopt doctor` says: cpu tensors go to: cpu"
            )
        return None

    def host_scalars(self, device: torch.device) -> bool:
        return True

    def supports(self, param: ParamState) -> bool:
        return (
            param.parameter.dtype in DTYPE_NAMES
            and is_non_overlapping_and_dense(param)
            and (param.mask is None or memory_grid(param) is not None)
        )

    def fan_in(self, params: Sequence[ParamState]) -> Tensor:
        masks = [packed.mask for packed in self._packed(params) if packed.mask is not None]
        sizes = [mask.neurons for mask in masks]
        counts = torch.empty(sum(sizes), dtype=torch.int64)
        threads, at = torch.get_num_threads(), counts.data_ptr()
        for mask, size in zip(masks, sizes, strict=True):
            mask.count_fan_in(at, threads)
            at += size * counts.itemsize
        return counts.double()

    def plan(self, params: Sequence[ParamState], factors: Sequence[Factors | None]) -> CpuPlan:
        packed = self._packed(params)
        for param, own, own_factors in zip(params, packed, factors, strict=True):
            if param not in self._tensors:
                self._tensors[param] = _tensor(param, own, own_factors)
        return CpuPlan(params, [self._tensors[param] for param in params], [own.watch for own in packed])


class CpuPlan:
    def __init__(
        self,
        params: Sequence[ParamState],
        tensors: list[native_library.Tensor],
        watches: Sequence[native_library.WriteWatch | None],
    ) -> None:
        self._params, self._watches = params, watches  # the table refers to the memory of the parameters
        self._table = native_library.Table(tensors, [param.rule for param in params])

    def step(self, inputs: Inputs) -> None:
        native_library.step(self._table, inputs.addresses, _rules(inputs), torch.get_num_threads())

    def squared_norm(self, inputs: Inputs, over: NormOver) -> Tensor:
        squares = native_library.squared_norm(
            self._table, inputs.addresses, _rules(inputs), torch.get_num_threads(), dense=over == "dense"
        )
        return torch.tensor(squares, dtype=torch.float64)

    def unseen_writes(self, everything: bool) -> list[UnseenWrite]:
        found: list[UnseenWrite] = []
        if not native_library.any_written(self._table, everything):
            return found
        for param, watch in zip(self._params, self._watches, strict=True):
            if watch is None:
                continue
            if watch.mask_written:
                found.append(UnseenWrite(param, to_mask=True))
            if watch.weights_written:
                found.append(UnseenWrite(param, to_mask=False))
            watch.forget()
        self._table.forget()
        return found

    def native_table(self) -> native_library.Table:
        return self._table


class _Packed(NamedTuple):
    """The packed mask of a parameter, and what notices writes to it."""

    mask: native_library.PackedMask | None
    watch: native_library.WriteWatch | None
    """None: there is no mask, or it has gaps, or it is that of complex numbers: writes to it go unnoticed."""


def _pack(param: ParamState) -> _Packed:
    """Pack the mask: once for each change of it."""
    if param.mask is None:
        return _Packed(None, None)
    grid = memory_grid(param)
    assert grid is not None
    ordered = mask_in_memory_order(param)  # it must live until it is packed
    mask = native_library.PackedMask(ordered.data_ptr(), *grid, threads=torch.get_num_threads())
    given = param.given_mask
    if given is None or not in_order(given, dim_order(given)):
        return _Packed(mask, None)
    numel, is_in_order = param.parameter.numel(), in_order(given, param.dim_order)
    return _Packed(
        mask,
        native_library.WriteWatch(given.data_ptr(), given.element_size(), mask, numel, is_in_order),
    )


def _tensor(param: ParamState, packed: _Packed, factors: Factors | None) -> native_library.Tensor:
    c = None if factors is None else factors.c.contiguous()
    return native_library.Tensor(
        dtype=DTYPE_NAMES[param.parameter.dtype],
        parameter=param.parameter.data_ptr(),
        momentum_buffer=address_of(param.momentum_buffer),
        numel=param.parameter.numel(),
        ham=param.ham,
        mask=packed.mask,
        factors=address_of(c),
        watch=packed.watch,
    )


def _rules(inputs: Inputs) -> list[native_library.Rule]:
    return [native_library.Rule(**rule._asdict()) for rule in inputs.rules]


CPU = Cpu()
