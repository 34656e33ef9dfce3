"""The memory and the versions of tensors: read from many at once, to be compared with earlier ones."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import Parameter, is_lazy

from .. import native_library

_VERSION = attrgetter("_version")


class Memory(NamedTuple):
    """The memory of some tensors. Two are equal if the tensors are the same memory, read in the same way.

    ``layout`` has dtypes, devices, shapes and strides, in a form that is only to be compared. ``addresses``
    has an unsigned integer of 8 bytes for each tensor; 0 for None, sparse tensors, and parameters that are
    not initialised yet.
    """

    layout: object
    addresses: bytes


def memory_of(tensors: Sequence[Tensor | None]) -> Memory:
    """Return the memory of tensors, any of which may be None."""
    found = None if READER is None else READER.read(tensors)
    return _read(tensors) if found is None else Memory(*found)


def addresses_of(tensors: Iterable[Tensor]) -> bytes:
    """Return ``Memory.addresses`` of strided tensors."""
    return array("Q", map(Tensor.data_ptr, tensors)).tobytes()


def versions_of(tensors: Iterable[Tensor]) -> list[int]:
    """Return the number of writes to each tensor, as PyTorch counts them."""
    return [*map(_VERSION, tensors)]


def _read(tensors: Sequence[Tensor | None]) -> Memory:
    """Read without the native library: for tensors that DLPack cannot describe, and for an older PyTorch."""
    described = [*map(_describe, tensors)]
    return Memory([layout for layout, _ in described], array("Q", [to for _, to in described]).tobytes())


def _describe(tensor: Tensor | None) -> tuple[object, int]:
    """Return the layout and the address of one tensor."""
    if tensor is None or is_lazy(tensor):
        return None, 0
    if tensor.layout is not torch.strided:
        return (tensor.layout, tensor.dtype, tensor.device, tensor.shape), 0
    return (tensor.stride(), tensor.dtype, tensor.device, tensor.shape), tensor.data_ptr()


def _reader() -> native_library.MemoryReader | None:
    """Return what reads tensors through DLPack's C exchange API, which PyTorch has from 2.10 on."""
    api = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if api is None or native_library.MISSING:
        return None
    try:
        return native_library.MemoryReader(api, Tensor, Parameter)
    except (TypeError, ValueError):  # an interface that the library does not know
        return None


READER = _reader()
