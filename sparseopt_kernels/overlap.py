"""Parameters that share memory, such as ``decoder.weight.data = encoder.weight.data``: which they are, in
which order they are updated, and that their masks agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .registered_masks import as_boolean


class MaskedTensor(NamedTuple):
    """A parameter, its mask (None: dense), and what to call it in an error."""

    parameter: Tensor
    mask: Tensor | None
    name: str


class _Extent(NamedTuple):
    """The memory of a parameter, from its first byte to behind its last."""

    device: tuple[str, int]
    begin: int
    end: int
    position: int


def turns_of(parameters: Sequence[Tensor]) -> list[int]:
    """Return the turn of each parameter: 0, and for one that shares memory with others before it, the turn
    after the last of theirs.

    Parameters of one turn share no memory, and can be updated at once. ``torch.optim.SGD(foreach=False)``
    updates all of them one after the other; in the order of the turns, the result is the same.
    """
    turns = [0] * len(parameters)
    for cluster in _clusters(parameters):
        for turn, position in enumerate(cluster):
            turns[position] = turn
    return turns


def check_overlapping_masks(tensors: Sequence[MaskedTensor]) -> None:
    """Raise ``ValueError``, naming two parameters, where they share memory and their masks differ there."""
    for cluster in _clusters([t.parameter for t in tensors]):
        members = [tensors[position] for position in cluster]
        if all(t.mask is None for t in members):
            continue
        for i, first in enumerate(members):
            for second in members[i + 1 :]:
                if _masks_differ(first, second):
                    raise ValueError(
                        f"{first.name!r} and {second.name!r} share memory, and their masks differ there: "
                        "make them one Parameter (decoder.weight = encoder.weight), give them masks that "
                        "agree, or leave both dense"
                    )


def _clusters(parameters: Sequence[Tensor]) -> list[list[int]]:
    """Return the positions of those that share memory, by runs of memory that hang together, in order."""
    extents = sorted(_Extent(*_extent(p), i) for i, p in enumerate(parameters) if _has_memory(p))
    clusters: list[list[int]] = []
    last: _Extent | None = None
    for extent in extents:
        if last is not None and extent.device == last.device and extent.begin < last.end:
            clusters[-1].append(extent.position)
            last = last._replace(end=max(last.end, extent.end))
        else:
            clusters.append([extent.position])
            last = extent
    return [sorted(cluster) for cluster in clusters if len(cluster) > 1]


def _has_memory(parameter: Tensor) -> bool:
    return (
        parameter.layout is torch.strided
        and parameter.device.type != "meta"
        and parameter.numel() > 0
        and parameter.data_ptr() != 0
    )


def _extent(parameter: Tensor) -> tuple[tuple[str, int], int, int]:
    last = sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
    device = (parameter.device.type, -1 if parameter.device.index is None else parameter.device.index)
    begin = parameter.data_ptr()
    return device, begin, begin + (last + 1) * parameter.element_size()


def _masks_differ(first: MaskedTensor, second: MaskedTensor) -> bool:
    """Tell if a byte of memory that both have is masked by one and not by the other."""
    (_, begin_1, end_1), (_, begin_2, end_2) = _extent(first.parameter), _extent(second.parameter)
    begin, end = min(begin_1, begin_2), max(end_1, end_2)
    size = first.parameter.element_size()
    if size != second.parameter.element_size() or (begin_1 - begin_2) % size != 0:
        return True  # numbers of one are parts of numbers of the other: no mask can be right for both
    absent = 2
    memory = torch.full(((end - begin) // size,), absent, dtype=torch.uint8, device=first.parameter.device)
    _view(memory, first.parameter, (begin_1 - begin) // size).copy_(_activity(first))
    there = _view(memory, second.parameter, (begin_2 - begin) // size)
    return bool(((there != absent) & (there != _activity(second))).any())


def _view(memory: Tensor, like: Tensor, offset: int) -> Tensor:
    return memory.as_strided(like.shape, like.stride(), offset)


def _activity(tensor: MaskedTensor) -> Tensor:
    if tensor.mask is None:
        return torch.ones((), dtype=torch.uint8, device=tensor.parameter.device).expand(
            tensor.parameter.shape
        )
    return as_boolean(tensor.mask).to(torch.uint8)
