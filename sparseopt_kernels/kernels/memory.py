"""The layout of tensors in memory, for kernels that walk it in order. Nothing here is of any one backend."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from .contract import ParamState

# What the C++ libraries call the types of weights that they know.
_WEIGHT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DTYPE_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in _WEIGHT_DTYPES}
Order = tuple[int, ...] | None  # of the dimensions in memory; None: as they are


def dim_order(tensor: Tensor) -> Order:
    """Return the dimensions from the largest stride to the smallest, as ``Tensor.dim_order`` does.

    (0, 2, 3, 1) for channels_last; None for a contiguous tensor.
    """
    if tensor.is_contiguous():
        return None
    strides = tensor.stride()
    return tuple(sorted(range(tensor.ndim), key=lambda dim: (-strides[dim], dim)))


def in_order(tensor: Tensor, order: Order) -> bool:
    """Tell if the memory of ``tensor`` is its dimensions in ``order``, without gaps."""
    return tensor.is_contiguous() if order is None else tensor.permute(order).is_contiguous()


def address_of(tensor: Tensor | None) -> int:
    """Return the address of a tensor, as the libraries and kernels take it; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def is_non_overlapping_and_dense(param: ParamState) -> bool:
    """Tell if parameter, momentum buffer and gradient are of one dtype, and lie in one order without gaps."""
    parameter, buffer = param.parameter, param.momentum_buffer
    order = param.dim_order
    return (
        param.gradient_dtype == parameter.dtype
        and in_order(parameter, order)
        and (buffer is None or (buffer.dtype == parameter.dtype and in_order(buffer, order)))
    )


def memory_grid(param: ParamState) -> tuple[int, int, int, int] | None:
    """Return ``Neurons.grid`` of the mask as it lies in memory; None where groups are not whole runs
    there."""
    shape, neurons = param.parameter.shape, param.neurons
    order = param.dim_order
    if order is None:
        return neurons.grid(shape)
    if neurons.groups > 1 and order[0] != 0:
        return None
    position = order.index(neurons.dim)
    before = prod(shape[dim] for dim in order[:position])
    after = prod(shape[dim] for dim in order[position + 1 :])
    return neurons.groups, before // neurons.groups, shape[neurons.dim], after


def mask_in_memory_order(param: ParamState) -> Tensor:
    """Return the mask, contiguous, in the order in which the elements of the parameter lie in memory."""
    assert param.mask is not None
    order = param.dim_order
    return (param.mask if order is None else param.mask.permute(order)).contiguous()


MASK_ALIGNMENT = 16  # bytes
# Kernels number columns with 31 bits, and look at some behind the last one.
_MOST_WEIGHTS, _MOST_COLUMNS = 1 << 33, 1 << 30


class Rows(NamedTuple):
    """A parameter as GPU kernels see it: rows that are whole runs of memory."""

    rows: int
    columns: int  # all elements, without a mask
    mask: Tensor | None = None  # boolean (rows, columns), contiguous, at a multiple of MASK_ALIGNMENT


def has_rows(param: ParamState) -> bool:
    """Tell if neurons are whole runs of memory, and there are no more sectors and columns than kernels can
    number.

    Neurons of transposed convolutions are not.
    """
    if param.parameter.numel() >= _MOST_WEIGHTS:
        return False
    if param.mask is None or param.parameter.numel() == 0:
        return True
    grid = memory_grid(param)
    return grid is not None and grid[1] == 1 and grid[3] < _MOST_COLUMNS


def rows_of(param: ParamState) -> Rows:
    """Return the rows of a parameter for which :func:`has_rows` is true."""
    parameter = param.parameter
    grid = memory_grid(param)
    if param.mask is None or parameter.numel() == 0 or grid is None:
        return Rows(1, parameter.numel())
    groups, _, neurons, columns = grid
    mask = mask_in_memory_order(param)
    if mask.data_ptr() % MASK_ALIGNMENT != 0:
        mask = mask.clone()
    return Rows(groups * neurons, columns, mask.view(groups * neurons, columns))
