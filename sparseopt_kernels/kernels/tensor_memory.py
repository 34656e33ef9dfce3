"""Where tensors lie in memory: read from many at once, to be compared with what was read before."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import Parameter, is_lazy

if TYPE_CHECKING:
    from .._native import MemoryReader


class Memory(NamedTuple):
    """Equal where tensors are the same memory, read in the same way.

    ``layout`` tells dtypes, devices, shapes and strides, in a form that is to be compared and nothing else.
    ``addresses`` has an unsigned integer of 8 bytes for each; 0 for what has no address: None, sparse
    tensors, parameters that are not initialised yet.
    """

    layout: object
    addresses: bytes


def memory_of(tensors: Sequence[Tensor | None]) -> Memory:
    """The memory of tensors, any of which may be None."""
    found = None if READER is None else READER.read(tensors)
    return _read(tensors) if found is None else Memory(*found)


def addresses_of(tensors: Iterable[Tensor]) -> bytes:
    """``Memory.addresses`` of strided tensors."""
    return array("Q", map(Tensor.data_ptr, tensors)).tobytes()


def _read(tensors: Sequence[Tensor | None]) -> Memory:
    """What the native library does, for what DLPack has no word for and for an older PyTorch."""
    described = [*map(_describe, tensors)]
    return Memory([layout for layout, _ in described], array("Q", [to for _, to in described]).tobytes())


def _describe(tensor: Tensor | None) -> tuple[object, int]:
    """The layout and the address of one tensor."""
    if tensor is None or is_lazy(tensor):
        return None, 0
    if tensor.layout is not torch.strided:
        return (tensor.layout, tensor.dtype, tensor.device, tensor.shape), 0
    return (tensor.stride(), tensor.dtype, tensor.device, tensor.shape), tensor.data_ptr()


def _reader() -> MemoryReader | None:
    """Reads tensors through DLPack's C exchange API, which PyTorch has from 2.10 on."""
    api = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if api is None:
        return None
    try:
        from .._native import MemoryReader

        return MemoryReader(api, Tensor, Parameter)
    except (ImportError, TypeError, ValueError):  # no library, or an interface that it does not know
        return None


READER = _reader()
