"""How tensors lie in memory: what kernels that walk it in order need to know. Nothing of any one backend."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from .contract import Tensors

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


def address_of(tensor: Tensor | None) -> int:
    """Where it lies, as the libraries and the kernels take it: 0 is none."""
    return 0 if tensor is None else tensor.data_ptr()


def is_walkable(tensors: Tensors) -> bool:
    """Whether parameter, momentum buffer and gradient are of one dtype, and lie in one order without gaps."""
    parameter, buffer = tensors.parameter, tensors.momentum_buffer
    order = memory_order(parameter)
    return (
        tensors.gradient_dtype == parameter.dtype
        and in_order(parameter, order)
        and (buffer is None or (buffer.dtype == parameter.dtype and in_order(buffer, order)))
    )


def memory_grid(tensors: Tensors) -> tuple[int, int, int, int] | None:
    """``Neurons.grid`` of the mask as it lies in memory; None where groups are not whole runs there."""
    shape, neurons = tensors.parameter.shape, tensors.neurons
    order = memory_order(tensors.parameter)
    if order is None:
        return neurons.grid(shape)
    if neurons.groups > 1 and order[0] != 0:
        return None
    position = order.index(neurons.dim)
    before = prod(shape[dim] for dim in order[:position])
    after = prod(shape[dim] for dim in order[position + 1 :])
    return neurons.groups, before // neurons.groups, shape[neurons.dim], after


def mask_in_memory_order(tensors: Tensors) -> Tensor:
    """The mask, contiguous, in the order in which the parameter's elements lie in memory."""
    assert tensors.mask is not None
    order = memory_order(tensors.parameter)
    return (tensors.mask if order is None else tensors.mask.permute(order)).contiguous()


MASK_ALIGNMENT = 16  # bytes
_MOST_WEIGHTS, _MOST_COLUMNS = 1 << 33, 1 << 31


class Rows(NamedTuple):
    """A parameter as GPU kernels see it: rows that are whole runs of memory."""

    rows: int
    columns: int  # all elements, without a mask
    mask: Tensor | None = None  # boolean (rows, columns), contiguous, at a multiple of MASK_ALIGNMENT
    mean_fan_in: Tensor | None = None  # 0-d, of the arithmetic type


def has_rows(tensors: Tensors) -> bool:
    """Whether neurons are whole runs of memory (not in transposed convolutions), and sectors of 4 weights and
    the weights of a neuron can be numbered with 31 bits."""
    if tensors.parameter.numel() >= _MOST_WEIGHTS:
        return False
    if tensors.mask is None or tensors.parameter.numel() == 0:
        return True
    grid = memory_grid(tensors)
    return grid is not None and grid[1] == 1 and grid[3] < _MOST_COLUMNS


def rows_of(tensors: Tensors) -> Rows:
    """The rows of a parameter that has them."""
    parameter = tensors.parameter
    grid = memory_grid(tensors)
    if tensors.mask is None or parameter.numel() == 0 or grid is None:
        return Rows(1, parameter.numel())
    groups, _, neurons, columns = grid
    mask = mask_in_memory_order(tensors)
    if mask.data_ptr() % MASK_ALIGNMENT != 0:
        mask = mask.clone()
    return Rows(groups * neurons, columns, mask.view(groups * neurons, columns))
