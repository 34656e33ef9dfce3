"""What a change of a mask asks for at once: in the native library for tensors on a CPU, else in PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from ..kernels import cpu as native
from ..kernels.memory import in_order, memory_order
from ..masks.registered_masks import as_boolean
from ..neurons import Neurons

_WORDS = (2, 4, 8)  # bytes of the elements that the native library zeroes


def zero_outside_masks(masks: Mapping[Parameter, Tensor]) -> None:
    """Zero, in place, the weights outside their masks, which may be boolean or of 0 and 1."""
    with torch.no_grad():
        for parameter, mask in masks.items():
            zero_outside(as_boolean(mask), [parameter])


def zero_outside(mask: Tensor, tensors: Sequence[Tensor]) -> None:
    """Zero, in place, what lies outside a mask.

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
    if native.is_missing() or tensor.device.type != "cpu" or tensor.element_size() not in _WORDS:
        return False
    if tensor.is_inference():  # it has no version that could be counted
        return False
    order = memory_order(tensor)
    if not (in_order(tensor, order) and in_order(mask, order)):
        return False
    from .. import _native

    # Autograd must notice a weight that changes under it; before the write, so that an interrupt between the
    # two cannot hide it.
    torch.autograd.graph.increment_version(tensor)
    threads = torch.get_num_threads()
    _native.zero_outside(mask.data_ptr(), tensor.data_ptr(), mask.numel(), tensor.element_size(), threads)
    return True


def largest_fan_in(mask: Tensor, neurons: Neurons) -> int:
    """The largest fan-in of a neuron.

    Args:
        mask: boolean, on the CPU, with active weights.
        neurons: of the mask.
    """
    groups, segments, per_group, length = neurons.grid(mask.shape)
    if not native.is_missing() and segments == 1 and mask.is_contiguous():
        from .. import _native

        return _native.largest_row_count(mask.data_ptr(), groups * per_group, length, torch.get_num_threads())
    # Without a temporary tensor as large as the weight.
    group, _, neuron, _ = mask.reshape(groups, segments, per_group, length).nonzero(as_tuple=True)
    return int((group * per_group + neuron).bincount().max())
