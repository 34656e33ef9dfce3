"""Masks are applied: weights and momentum outside of them become zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from .. import native_library
from ..kernels.memory import dim_order, in_order
from ..masks.registered_masks import as_boolean
from ..sharding import local_part

_WORDS = (2, 4, 8)  # bytes of the elements that the native library zeroes


def zero_outside_masks(masks: Mapping[Parameter, Tensor]) -> None:
    """Zero, in place, the weights outside their masks, which may be boolean or of 0 and 1."""
    with torch.no_grad():
        for parameter, mask in masks.items():
            zero_outside(as_boolean(local_part(mask)), [local_part(parameter)])


def zero_outside(mask: Tensor, tensors: Sequence[Tensor]) -> None:
    """Zero, in place, the elements outside a mask: natively for tensors on a CPU, else in PyTorch.

    Args:
        mask: boolean.
        tensors: of its shape and device; any dtype.
    """
    slow = [tensor for tensor in tensors if not _zeroed_natively(mask, tensor)]
    if slow:
        outside = ~mask
        for tensor in slow:
            tensor.masked_fill_(outside, 0)


def _zeroed_natively(mask: Tensor, tensor: Tensor) -> bool:
    if native_library.MISSING or tensor.device.type != "cpu" or tensor.element_size() not in _WORDS:
        return False
    if tensor.is_inference():  # it has no version that could be counted
        return False
    if 0 in (tensor.data_ptr(), mask.data_ptr()):  # of a subclass, the address may say nothing
        return False
    order = dim_order(tensor)
    if not (in_order(tensor, order) and in_order(mask, order)):
        return False
    # Autograd must notice a weight that changes under it; before the write, so that an interrupt between the
    # two cannot hide it.
    torch.autograd.graph.increment_version(tensor)
    threads = torch.get_num_threads()
    native_library.zero_outside(
        mask.data_ptr(), tensor.data_ptr(), mask.numel(), tensor.element_size(), threads
    )
    return True
