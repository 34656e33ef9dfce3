"""How tensors lie in memory: what a kernel that walks it in order needs to know. Nothing of any backend."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from .contract import Entry

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


def laid_out(grad: Tensor, entry: Entry, order: Order) -> Tensor:
    """The gradient, or a copy of it in the parameter's memory format."""
    return grad if in_order(grad, order) else torch.empty_like(entry.parameter).copy_(grad)


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


def ordered_mask(entry: Entry, order: Order) -> Tensor:
    """The mask, contiguous, in the order of the parameter's memory."""
    assert entry.mask is not None
    return (entry.mask if order is None else entry.mask.permute(order)).contiguous()
