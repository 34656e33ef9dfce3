"""Devices as GPU backends need them: copies that do not wait, streams, and memory that CUDA graphs read."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

# What a graph copies from, or reads, must live as long as the graph, and PyTorch does not tell when it dies.
# Tables, masks in bits and lists, that is: up to a tenth of the weights.
_read_by_graphs: list[object] = []

# Pinned bytes of the host that no graph copies from yet: within the capture of one, none can be pinned.
_staging: dict[torch.device, Tensor] = {}
_wanted: dict[torch.device, WeakKeyDictionary[object, int]] = {}
_LEAST_STAGING = 1 << 16
_ALIGNMENT = 16


def upload(values: Tensor, device: torch.device) -> Tensor:
    """Copy ``values`` from the host to ``device``, without waiting for the copy.

    Raises:
        RuntimeError: a graph is being captured, and there is not enough of what ``reserve_staging`` pins.
    """
    if _needs_pinning(device):
        values = _staged(values, device) if capturing() else values.pin_memory()
    keep_for_graph(values)
    return torch.empty_like(values, device=device).copy_(values, non_blocking=True)


def reserve_staging(owner: object, nbytes: int, device: torch.device) -> None:
    """Pin so many bytes for ``owner``, besides those of all others, for uploads in later captures of graphs.

    Call it outside of captures.
    """
    if not _needs_pinning(device):
        return
    wanted = _wanted.setdefault(device, WeakKeyDictionary())
    wanted[owner] = nbytes
    spare, total = _staging.get(device), sum(wanted.values())
    if spare is None or spare.numel() < total:
        _staging[device] = _pinned(max(total, _LEAST_STAGING))


def _needs_pinning(device: torch.device) -> bool:
    """Tell if a copy that does not wait needs pinned memory. A capture refuses others."""
    return device.type == "cuda"


def _pinned(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)


def _staged(values: Tensor, device: torch.device) -> Tensor:
    """Copy ``values`` to pinned memory of their own, which the graph reads whenever it is replayed."""
    spare = _staging.get(device, torch.empty(0, dtype=torch.uint8, device="cpu"))
    if spare.numel() < values.nbytes:
        raise RuntimeError(
            "steps are captured in CUDA graphs, one after the other, and no memory is left for these to copy "
            "from: make one step outside of a graph between them"
        )
    taken = -(-values.nbytes // _ALIGNMENT) * _ALIGNMENT
    _staging[device] = spare[taken:]
    return spare[: values.nbytes].view(values.dtype).view(values.shape).copy_(values)


def capturing() -> bool:
    """Tell if what is launched now, on the current device, becomes part of a CUDA graph."""
    started: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return started and torch.cuda.is_current_stream_capturing()


def refuse_capture(device: torch.device) -> None:
    """Raise ``RuntimeError`` where a step on ``device`` is captured that replays could not repeat."""
    with device_guard(device):
        if capturing():
            raise RuntimeError(
                "a step is captured in a CUDA graph that is the optimizer's first, or the first after a mask "
                "or a weight was written: make one step outside the graph first"
            )


def keep_for_graph(memory: object) -> None:
    """Keep what a graph that is being captured reads."""
    if capturing():
        _read_by_graphs.append(memory)


class Shared:
    """Device memory that may be read on other streams than the one it was allocated on.

    The allocator returns it to that stream, which must not overwrite it before the others have read it.
    """

    def __init__(self, memory: Sequence[Tensor], device: torch.device) -> None:
        self._memory, self._device = memory, device
        self._known = {0} if device.type == "cpu" else set[int]()  # there, it is the only one

    def use(self, current: int) -> None:
        """Tell the allocator, once for each stream, that the current one reads the memory."""
        if current not in self._known:
            self._known.add(current)
            stream = getattr(torch, self._device.type).current_stream(self._device)
            for tensor in self._memory:
                tensor.record_stream(stream)


def current_stream(device: torch.device) -> int:
    """Return the stream that PyTorch queues this thread's work on; 0 where there are none."""
    if device.type == "cpu":
        return 0
    stream = getattr(torch, device.type).current_stream(device)
    return int(stream.cuda_stream if device.type == "cuda" else stream.sycl_queue)


def device_guard(device: torch.device) -> AbstractContextManager[Any]:
    """Make a device the current one, on which kernels are launched."""
    return getattr(torch, device.type).device(device) if device.type in ("cuda", "xpu") else nullcontext()


@cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a device; 1 where kernels are run on the CPU."""
    if device.type == "cpu":
        return 1
    properties = getattr(torch, device.type).get_device_properties(device)
    return int(getattr(properties, "multi_processor_count", 0) or properties.max_compute_units)
