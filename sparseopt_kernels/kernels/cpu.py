"""The native CPU backend: C++ with OpenMP over rows (``csrc/cpu``), one call for all parameters.

Here is what PyTorch knows and the library does not: where tensors lie, and whether their memory is laid out
as the loops expect.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .contract import Inputs, NormOver, Tensors, UnseenWrite
from .derived import Derived
from .memory import (
    DTYPE_NAMES,
    address_of,
    in_order,
    is_walkable,
    mask_in_memory_order,
    memory_grid,
    memory_order,
)

_MISSING: str | None = None
try:
    import sparseopt_kernels._native as _native
except ModuleNotFoundError:
    _MISSING = "the native library was not built"
except ImportError as error:
    _MISSING = f"the native library cannot be loaded ({error})"

if TYPE_CHECKING:
    from .._native import Decision, WriteWatch
    from .._native import Rule as NativeRule
    from .._native import Tensor as NativeTensor


def build_info() -> dict[str, Any]:
    """What the native library was built with: see ``kernels.build_info``."""
    if _MISSING:
        return {"native": False, "reason": _MISSING}
    return {"native": True, **_native.build_info(), "isas": available_isas()}


def available_isas() -> tuple[str, ...]:
    """The instruction sets this processor can run, the best first. The environment variable
    ``SPARSEOPT_CPU_ISA`` names another one than the first."""
    return () if _MISSING else tuple(_native.available_isas())


def decisions() -> list[Decision]:
    """How the CPU backend visits masked tensors, as far as steps of this process have measured it."""
    return [] if _MISSING else _native.decisions()


def is_missing() -> bool:
    """Whether there is no native library that can be loaded."""
    return _MISSING is not None


class Native:
    def __init__(self) -> None:
        self._derive = Derived(_derive)

    def unavailable(self, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"it updates tensors on the cpu, not on {device.type}"
        if _MISSING:
            return (
                f"{_MISSING}: install a C++ compiler, then sparseopt_kernels again, "
                "then `sparseopt doctor` says: cpu tensors go to: cpu"
            )
        return None

    def host_scalars(self, device: torch.device) -> bool:
        return True

    def supports(self, tensors: Tensors) -> bool:
        return (
            tensors.parameter.dtype in DTYPE_NAMES
            and is_walkable(tensors)
            and (tensors.mask is None or memory_grid(tensors) is not None)
        )

    def plan(self, tensors: Sequence[Tensors]) -> NativePlan:
        return NativePlan(tensors, self._derive(tensors))


class NativePlan:
    def __init__(self, tensors: Sequence[Tensors], derived: Sequence[_Derived]) -> None:
        self._tensors = tensors  # whose memory the table refers to
        self._watches = [own.watch for own in derived]
        self.table = _native.Table([own.tensor for own in derived], [t.group for t in tensors])

    def step(self, inputs: Inputs) -> None:
        _native.step(self.table, inputs.addresses, _rules(inputs), torch.get_num_threads())

    def squared_norm(self, inputs: Inputs, over: NormOver) -> Tensor:
        squares = _native.squared_norm(
            self.table, inputs.addresses, _rules(inputs), torch.get_num_threads(), dense=over == "dense"
        )
        return torch.tensor(squares, dtype=torch.float64)

    def unseen_writes(self, everything: bool) -> list[UnseenWrite]:
        found: list[UnseenWrite] = []
        if not _native.any_written(self.table, everything):
            return found
        for tensors, watch in zip(self._tensors, self._watches, strict=True):
            if watch is None:
                continue
            if watch.mask_written:
                found.append(UnseenWrite(tensors, to_mask=True))
            if watch.weights_written:
                found.append(UnseenWrite(tensors, to_mask=False))
            watch.forget()
        self.table.forget()
        return found


class _Derived(NamedTuple):
    """The native form of a parameter, and who watches its mask."""

    tensor: NativeTensor
    watch: WriteWatch | None
    """Over the mask; None: there is none, or its memory has gaps."""


def _derive(tensors: Tensors) -> _Derived:
    """The native form of a parameter; the mask is packed here, once for each change of it."""
    parameter, buffer = tensors.parameter, tensors.momentum_buffer
    mask = watch = None
    if tensors.mask is not None:
        grid = memory_grid(tensors)
        assert grid is not None
        ordered = mask_in_memory_order(tensors)  # it must live until it is packed
        mask = _native.PackedMask(ordered.data_ptr(), *grid, threads=torch.get_num_threads())
        given = tensors.given_mask
        if given is not None and in_order(given, memory_order(given)):
            watch = _native.WriteWatch(
                given.data_ptr(),
                given.element_size(),
                mask,
                parameter.numel(),
                in_order(given, memory_order(parameter)),
            )
    tensor = _native.Tensor(
        dtype=DTYPE_NAMES[parameter.dtype],
        parameter=parameter.data_ptr(),
        momentum_buffer=address_of(buffer),
        numel=parameter.numel(),
        ham=tensors.ham,
        mask=mask,
        watch=watch,
    )
    return _Derived(tensor, watch)


def _rules(inputs: Inputs) -> list[NativeRule]:
    return [_native.Rule(**rule._asdict()) for rule in inputs.rules]


NATIVE = Native()
