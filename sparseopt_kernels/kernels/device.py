"""What backends on a device need of PyTorch: copies to it that do not wait, and CUDA graphs kept right."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

# What a graph copies from, or reads, must live as long as the graph, and PyTorch does not tell when it dies.
# Tables and packed masks, that is: a few per cent of the weights.
_read_by_graphs: list[object] = []

# Pinned bytes of the host that no graph copies from yet: within the capture of one, none can be pinned.
_staging: dict[torch.device, Tensor] = {}
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


def reserve_staging(nbytes: int, device: torch.device) -> None:
    """Have so many bytes to upload from in the captures of graphs to come. To be called outside of them."""
    spare = _staging.get(device)
    if _needs_pinning(device) and (spare is None or spare.numel() < nbytes):
        _staging[device] = _pinned(max(nbytes, _LEAST_STAGING))


def _needs_pinning(device: torch.device) -> bool:
    """PyTorch copies from other memory, too, but waits for it, and refuses it within a capture."""
    return device.type == "cuda"


def _pinned(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def _staged(values: Tensor, device: torch.device) -> Tensor:
    """``values`` in pinned memory of their own: the graph reads it whenever it is replayed."""
    spare = _staging.get(device, torch.empty(0, dtype=torch.uint8))
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


def made_current(device: torch.device) -> AbstractContextManager[Any]:
    """Kernels are launched on the current device."""
    return nullcontext() if device.type == "cpu" else getattr(torch, device.type).device(device)
