"""Finds different tensors that share memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def overlapping_pairs(tensors: Sequence[Tensor]) -> Iterator[tuple[int, int]]:
    """Yield the indices ``(i, j)``, ``i < j``, of strided tensors that have a byte in common.

    Interleaved views, such as the even and the odd columns of a matrix, do not overlap.
    """
    by_start = sorted((i for i, t in enumerate(tensors) if t.numel() > 0), key=lambda i: _start(tensors[i]))
    for position, i in enumerate(by_start):
        for j in by_start[position + 1 :]:
            if _start(tensors[j]) >= (_start(tensors[i])[0], end_of(tensors[i])):
                break
            if _have_common_byte(tensors[i], tensors[j]):
                yield min(i, j), max(i, j)


def _start(tensor: Tensor) -> tuple[str, int]:
    return str(tensor.device), tensor.data_ptr()


def end_of(tensor: Tensor) -> int:
    """Return the address one past the last byte of a tensor."""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + (last + 1) * tensor.element_size()


def _have_common_byte(low: Tensor, high: Tensor) -> bool:
    """Tell if two tensors with overlapping spans share a byte. ``high`` does not start before ``low``."""
    if all(end_of(t) - t.data_ptr() == t.numel() * t.element_size() for t in (low, high)):
        return True  # both fill their spans
    first, last = high.data_ptr(), min(end_of(low), end_of(high))
    return bool((_bytes_of(low, first, last) & _bytes_of(high, first, last)).any())


def _bytes_of(tensor: Tensor, first: int, last: int) -> Tensor:
    """Return a boolean CPU tensor that is True for each byte from ``first`` to ``last`` of the tensor."""
    addresses = torch.full((), tensor.data_ptr() - first)
    for n, stride in zip(tensor.shape, tensor.stride(), strict=True):
        addresses = addresses.unsqueeze(-1) + torch.arange(n) * (stride * tensor.element_size())
    own = torch.zeros(last - first, dtype=torch.bool)
    for byte in range(tensor.element_size()):
        within = (addresses + byte).flatten()
        own[within[(within >= 0) & (within < last - first)]] = True
    return own
