"""Where tensors lie in memory: read from many at once, to be compared with what was read before."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

if TYPE_CHECKING:
    from ._native import MemoryReader

_SHAPE, _DTYPE = attrgetter("shape"), attrgetter("dtype")


class Memory(NamedTuple):
    """Equal where tensors are the same memory, read in the same way.

    ``layout`` tells which are None, their dtypes, shapes and strides, in a form that is to be compared and
    nothing else. ``addresses`` has an unsigned integer of 8 bytes for each, 0 for None.
    """

    layout: object
    addresses: bytes


def memory_of(tensors: Sequence[Tensor | None]) -> Memory | None:
    """The memory of tensors; None where one of them is not strided."""
    found = None if _READER is None else _READER.read(tensors)
    return _read(tensors) if found is None else Memory(*found)


def addresses_of(tensors: Sequence[Tensor]) -> bytes:
    """``Memory.addresses`` of strided tensors."""
    return array("Q", map(Tensor.data_ptr, tensors)).tobytes()


def _read(tensors: Sequence[Tensor | None]) -> Memory | None:
    """What the native library does, for what DLPack has no word for and for an older PyTorch."""
    present = [tensor for tensor in tensors if tensor is not None]
    contiguous = [*map(Tensor.is_contiguous, present)]
    others = [tensor for tensor, is_it in zip(present, contiguous, strict=True) if not is_it]
    if any(tensor.layout is not torch.strided for tensor in others):
        return None
    absent = [i for i, tensor in enumerate(tensors) if tensor is None]
    addresses = [*map(Tensor.data_ptr, present)]
    for i in absent:
        addresses.insert(i, 0)
    layout = (
        absent,
        contiguous,
        [*map(Tensor.stride, others)],
        [*map(_SHAPE, present)],
        [*map(_DTYPE, present)],
    )
    return Memory(layout, array("Q", addresses).tobytes())


def _reader() -> MemoryReader | None:
    """Reads tensors through DLPack's C exchange API, which PyTorch has from 2.10 on."""
    api = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    try:
        from ._native import MemoryReader
    except ImportError:
        return None
    return None if api is None else MemoryReader(api, Tensor, Parameter)


_READER = _reader()
