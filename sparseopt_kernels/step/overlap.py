"""The order in which parameters are updated that share memory (``decoder.weight.data =
encoder.weight.data``), and whether their masks agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..masks.registered_masks import as_boolean
from ..masks.shared_memory import end_of, overlapping_pairs


class MaskedTensor(NamedTuple):
    """A parameter, its mask (None: dense), and what to call it in an error."""

    parameter: Tensor
    mask: Tensor | None
    name: str


def sharing_pairs(parameters: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Return the places of the parameters that share memory, in pairs: the earlier one first."""
    places = [i for i, p in enumerate(parameters) if _has_memory(p)]
    pairs = overlapping_pairs([parameters[place] for place in places])
    return sorted((places[i], places[j]) for i, j in pairs)


def turns_of(count: int, pairs: Sequence[tuple[int, int]]) -> list[int]:
    """Return the turn of each of ``count`` parameters: 0, or the one after the last turn of those before it
    whose memory it shares.

    Parameters of one turn share no memory, and can be updated at once. ``torch.optim.SGD(foreach=False)``
    updates all of them one after the other; in the order of the turns, the result is the same.

    Args:
        count: the number of parameters.
        pairs: what :func:`sharing_pairs` returned for them.
    """
    turns = [0] * count
    for i, j in sorted(pairs, key=lambda pair: pair[1]):
        turns[j] = max(turns[j], turns[i] + 1)
    return turns


def check_overlapping_masks(tensors: Sequence[MaskedTensor], pairs: Sequence[tuple[int, int]]) -> None:
    """Raise ``ValueError``, naming two parameters, where they share memory and their masks differ there.

    Args:
        tensors: the parameters and their masks.
        pairs: what :func:`sharing_pairs` returned for them.
    """
    for i, j in pairs:
        first, second = tensors[i], tensors[j]
        if (first.mask is not None or second.mask is not None) and _masks_differ(first, second):
            raise ValueError(
                f"{first.name!r} and {second.name!r} share memory, and their masks differ there: "
                "make them one Parameter (decoder.weight = encoder.weight), give them masks that "
                "agree, or leave both dense"
            )


def _has_memory(parameter: Tensor) -> bool:
    return parameter.layout is torch.strided and parameter.device.type != "meta" and parameter.data_ptr() != 0


def _masks_differ(first: MaskedTensor, second: MaskedTensor) -> bool:
    """Tell if a number that both have is masked in one and not in the other."""
    size = first.parameter.element_size()
    distance = second.parameter.data_ptr() - first.parameter.data_ptr()
    if size != second.parameter.element_size() or distance % size != 0:
        return True  # numbers of one are parts of numbers of the other: no mask can be right for both
    starts = (max(0, -distance // size), max(0, distance // size))
    absent = 2
    ends = [(end_of(t.parameter) - t.parameter.data_ptr()) // size for t in (first, second)]
    room = max(start + end for start, end in zip(starts, ends, strict=True))
    memory = torch.full((room,), absent, dtype=torch.uint8, device=first.parameter.device)
    _view(memory, first.parameter, starts[0]).copy_(_activity(first))
    there = _view(memory, second.parameter, starts[1])
    return bool(((there != absent) & (there != _activity(second))).any())


def _view(memory: Tensor, like: Tensor, offset: int) -> Tensor:
    return memory.as_strided(like.shape, like.stride(), offset)


def _activity(tensor: MaskedTensor) -> Tensor:
    if tensor.mask is None:
        return torch.ones(tensor.parameter.shape, dtype=torch.uint8, device=tensor.parameter.device)
    return as_boolean(tensor.mask).to(torch.uint8)
