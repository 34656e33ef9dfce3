"""Finds tensors that share memory although they are different tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def overlapping_pairs(tensors: Sequence[Tensor]) -> Iterator[tuple[int, int]]:
    """Find the pairs of strided tensors that have an element at the same address, by their places.

    Two views that lie between each other's elements (even and odd columns of a matrix) do not overlap.
    """
    by_start = sorted((i for i, t in enumerate(tensors) if t.numel() > 0), key=lambda i: _start(tensors[i]))
    for position, i in enumerate(by_start):
        for j in by_start[position + 1 :]:
            if _start(tensors[j]) >= (_start(tensors[i])[0], _end(tensors[i])):
                break
            if _have_common_byte(tensors[i], tensors[j]):
                yield min(i, j), max(i, j)


def _start(tensor: Tensor) -> tuple[str, int]:
    return str(tensor.device), tensor.data_ptr()


def _end(tensor: Tensor) -> int:
    """One past the last byte."""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + (last + 1) * tensor.element_size()


def _have_common_byte(low: Tensor, high: Tensor) -> bool:
    """Tell if two tensors whose spans overlap, of which ``high`` does not start first, share a byte."""
    if all(_end(t) - t.data_ptr() == t.numel() * t.element_size() for t in (low, high)):
        return True  # both fill their spans
    first, last = high.data_ptr(), min(_end(low), _end(high))
    return bool((_bytes_of(low, first, last) & _bytes_of(high, first, last)).any())


def _bytes_of(tensor: Tensor, first: int, last: int) -> Tensor:
    """Mark which bytes from ``first`` to ``last`` belong to the tensor: boolean, on the CPU."""
    addresses = torch.full((), tensor.data_ptr() - first)
    for n, stride in zip(tensor.shape, tensor.stride(), strict=True):
        addresses = addresses.unsqueeze(-1) + torch.arange(n) * (stride * tensor.element_size())
    own = torch.zeros(last - first, dtype=torch.bool)
    for byte in range(tensor.element_size()):
        within = (addresses + byte).flatten()
        own[within[(within >= 0) & (within < last - first)]] = True
    return own
