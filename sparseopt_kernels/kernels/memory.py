"""How tensors lie in memory: what kernels that walk it in order need to know. Nothing of any one backend."""

from __future__ import annotations

from collections.abc import Callable, Container
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ..neurons import arithmetic_dtype
from .contract import Batch, Entry

# What the C++ libraries call the types of weights that they know.
DTYPE_NAMES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
Order = tuple[int, ...] | None  # of the dimensions in memory; None: as they are


def memory_order(tensor: Tensor) -> Order:
    """The dimensions from the largest stride to the smallest: (0, 2, 3, 1) for channels_last."""
    if tensor.is_contiguous():
        return None
    strides = tensor.stride()
    return tuple(sorted(range(tensor.ndim), key=lambda dim: (-strides[dim], dim)))


def in_order(tensor: Tensor, order: Order) -> bool:
    """Whether the memory of ``tensor`` is its dimensions in ``order``, without gaps."""
    return tensor.is_contiguous() if order is None else tensor.permute(order).is_contiguous()


def is_walkable(entry: Entry, order: Order) -> bool:
    """Whether parameter and momentum buffer are of one dtype, and both lie in ``order`` without gaps."""
    parameter, buffer = entry.parameter, entry.momentum_buffer
    return in_order(parameter, order) and (
        buffer is None or (buffer.dtype == parameter.dtype and in_order(buffer, order))
    )


def memory_grid(entry: Entry, order: Order) -> tuple[int, int, int, int] | None:
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


class Walk:
    """Which entries of a batch a backend's kernels walk: those whose plan says ``here`` and whose gradient
    is of their dtype. Their gradients are to lie in memory as they do.

    Attributes:
        entries: those that are walked.
        elsewhere: where the others are in the batch: the reference backend must update them.
        positions: what ``Batch.positions`` says of ``entries``.
    """

    def __init__(self, batch: Batch) -> None:
        self._grad_dtypes = [grad.dtype for grad in batch.grads]
        here = [
            entry.plan.here and dtype is batch.dtype
            for entry, dtype in zip(batch.entries, self._grad_dtypes, strict=True)
        ]
        self._here = [i for i, is_here in enumerate(here) if is_here]
        self.elsewhere = [i for i, is_here in enumerate(here) if not is_here]
        self.entries = [batch.entries[i] for i in self._here]
        self.positions = [batch.positions[i] for i in self._here]
        self._row_major = all(entry.plan.order is None for entry in self.entries)

    def fits(self, batch: Batch) -> bool:
        """Whether gradients are of the same dtypes as when this was made."""
        return [grad.dtype for grad in batch.grads] == self._grad_dtypes

    def grads(self, batch: Batch) -> list[Tensor]:
        """The gradients of ``entries``, or copies of them in the memory format of their parameters."""
        grads = [batch.grads[i] for i in self._here] if self.elsewhere else batch.grads
        if self._row_major and all(map(Tensor.is_contiguous, grads)):
            return grads
        return [
            grad if in_order(grad, entry.plan.order) else torch.empty_like(entry.parameter).copy_(grad)
            for grad, entry in zip(grads, self.entries, strict=True)
        ]


class Rows(NamedTuple):
    """A parameter as GPU kernels walk it: rows that are whole runs of memory, and the mask in bits."""

    dtype: torch.dtype
    order: Order
    here: bool  # whether it can be walked so
    rows: int = 1
    columns: int = 0  # all elements, without a mask
    bits: Tensor | None = None  # uint8 (rows, columns / 8, rounded up)
    mean_fan_in: Tensor | None = None  # 0-d, of the arithmetic type


Packer = Callable[[Tensor], tuple[Tensor, Tensor]]


def rows_of(entry: Entry, pack: Packer) -> Rows:
    """The rows of an entry. Nothing waits for the device.

    Args:
        entry: a parameter, with a mask or without.
        pack: makes of a boolean matrix its bits and the number of them that are set (0-d int64).
    """
    dtype, order = entry.parameter.dtype, memory_order(entry.parameter)
    if not is_walkable(entry, order):
        return Rows(dtype, order, here=False)
    if entry.mask is None or entry.parameter.numel() == 0:
        return Rows(dtype, order, True, 1, entry.parameter.numel())
    grid = memory_grid(entry, order)
    if grid is None or grid[1] != 1:  # a neuron in several pieces: a transposed convolution
        return Rows(dtype, order, here=False)
    groups, _, neurons, columns = grid
    rows = groups * neurons
    mask = entry.mask if order is None else entry.mask.permute(order)
    bits, nnz = pack(mask.contiguous().view(rows, columns))
    mean_fan_in = (nnz.double() / rows).to(arithmetic_dtype(dtype))
    return Rows(dtype, order, True, rows, columns, bits, mean_fan_in)


def walk_rows(batch: Batch, dtypes: Container[torch.dtype], pack: Packer) -> Walk:
    """The walk over a batch whose entries are planned as rows, where a backend knows their dtype."""
    for entry in batch.entries:
        if entry.plan is None or entry.plan.dtype is not batch.dtype:
            known = batch.dtype in dtypes
            entry.plan = rows_of(entry, pack) if known else Rows(batch.dtype, None, here=False)
    return Walk(batch)
