"""What backends on a device need of PyTorch: copies to it that do not wait, and CUDA graphs kept right."""

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
    """``values``, which are on the host, on ``device``: one copy, without waiting for it.

    Raises:
        RuntimeError: a graph is being captured, and there is not enough of what ``reserve_staging`` pins.
    """
    if _needs_pinning(device):
        values = _staged(values, device) if capturing() else values.pin_memory()
    keep_for_graph(values)
    return torch.empty_like(values, device=device).copy_(values, non_blocking=True)


def reserve_staging(owner: object, nbytes: int, device: torch.device) -> None:
    """Have so many bytes for ``owner``, besides those of all others, to upload from in the captures of graphs
    to come. To be called outside of them."""
    if not _needs_pinning(device):
        return
    wanted = _wanted.setdefault(device, WeakKeyDictionary())
    wanted[owner] = nbytes
    spare, total = _staging.get(device), sum(wanted.values())
    if spare is None or spare.numel() < total:
        _staging[device] = _pinned(max(total, _LEAST_STAGING))


def _needs_pinning(device: torch.device) -> bool:
    """PyTorch copies from other memory, too, but waits for it, and refuses it within a capture."""
    return device.type == "cuda"


def _pinned(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)


def _staged(values: Tensor, device: torch.device) -> Tensor:
    """``values`` in pinned memory of their own: the graph reads it whenever it is replayed."""
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
    """Whether what is launched now becomes part of a CUDA graph."""
    started: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return started and torch.cuda.is_current_stream_capturing()


def refuse_capture() -> None:
    """Raise ``RuntimeError`` where a step is captured that replays could not repeat."""
    if capturing():
        raise RuntimeError(
            "a step is captured in a CUDA graph that is the optimizer's first, or the first after a mask or "
            "a weight was written: make one step outside the graph first"
        )


def keep_for_graph(memory: object) -> None:
    """Keep what a graph that is being captured reads."""
    if capturing():
        _read_by_graphs.append(memory)


class Shared:
    """Device memory that may be read on other streams than it was made on. The allocator gives it back to the
    latter, which must not write over it before the others have read it."""

    def __init__(self, memory: Sequence[Tensor], device: torch.device) -> None:
        self._memory, self._device = memory, device
        self._known = {0} if device.type == "cpu" else set[int]()  # there, it is the only one

    def use(self, current: int) -> None:
        """Tell the allocator of the current stream, the first time. That of the memory itself is no news."""
        if current not in self._known:
            self._known.add(current)
            stream = getattr(torch, self._device.type).current_stream(self._device)
            for tensor in self._memory:
                tensor.record_stream(stream)


def current_stream(device: torch.device) -> int:
    """The stream that PyTorch queues this thread's work on: 0 where there are none."""
    if device.type == "cpu":
        return 0
    stream = getattr(torch, device.type).current_stream(device)
    return int(stream.cuda_stream if device.type == "cuda" else stream.sycl_queue)


def made_current(device: torch.device) -> AbstractContextManager[Any]:
    """Kernels are launched on the current device."""
    return nullcontext() if device.type == "cpu" else getattr(torch, device.type).device(device)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many there are, to share out work among: 1 where kernels are run on the CPU."""
    if device.type == "cpu":
        return 1
    properties = getattr(torch, device.type).get_device_properties(device)
    return int(getattr(properties, "multi_processor_count", 0) or properties.max_compute_units)
