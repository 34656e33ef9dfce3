"""What backends on a device need of PyTorch: copies to it that do not wait, and CUDA graphs kept right."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

# What a graph copies from, or reads, must live as long as the graph, and PyTorch does not tell when it dies.
# Tables and packed masks, that is: a few per cent of the weights.
_read_by_graphs: list[object] = []


def upload(values: Tensor, device: torch.device) -> Tensor:
    """``values``, which are on the host, on ``device``: one copy, without waiting for it."""
    if device.type == "cuda" and not capturing():  # a graph copies from any memory, and may not pin it
        values = values.pin_memory()
    keep_for_graph(values)
    return torch.empty_like(values, device=device).copy_(values, non_blocking=True)


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
