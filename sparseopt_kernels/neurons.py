"""Where the neurons of a weight lie, their fan-in, and the type of the arithmetic.

Imports nothing of this package: backends, masks and topologies all stand on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

_WORD = 8  # bytes
_WORDS_ADDED = 128  # at most 255: the sum of each of the eight bytes must fit in a byte


@dataclass(frozen=True)
class Neurons:
    """The dimension of a weight that counts its neurons (output units, the rows of section 3 of the paper).

    ``dim`` is 0 for ``Linear`` and ``Conv*`` weights ``(out, in/groups, *kernel)``. It is 1 for
    ``ConvTranspose*`` weights ``(in, out/groups, *kernel)``, whose dimension 0 is then split in
    ``groups`` parts: neuron ``(g, j)`` is fed by ``weight[g * in/groups : (g + 1) * in/groups, j]``.
    """

    dim: int = 0
    groups: int = 1

    def grid(self, shape: Sequence[int]) -> tuple[int, int, int, int]:
        """``(groups, segments, neurons per group, length)``: a contiguous tensor of ``shape`` reshaped
        to it holds the weights of neuron ``(g, j)`` in ``[g, :, j, :]``."""
        if self.dim == 0:
            count = shape[0] if len(shape) else 1
            return 1, 1, count, prod(shape[1:])
        return self.groups, shape[0] // self.groups, shape[1], prod(shape[2:])

    def sizes(self, shape: Sequence[int]) -> tuple[int, int]:
        """The number of neurons of a weight of that shape, and of the weights of each: its fan-in without a
        mask."""
        groups, segments, per_group, length = self.grid(shape)
        return groups * per_group, segments * length

    def count(self, shape: Sequence[int]) -> int:
        """The number of neurons of a weight of that shape."""
        return self.sizes(shape)[0]

    def broadcast(self, values: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the values of the neurons, ``(neurons,)``, in a shape that broadcasts against a weight of
        ``shape``."""
        groups, segments, per_group, _ = self.grid(shape)
        leading = tuple(shape[: self.dim + 1])
        values = values.view(groups, 1, per_group).expand(groups, segments, per_group).reshape(leading)
        return values.view(leading + (1,) * (len(shape) - len(leading)))


def fan_in(mask: Tensor, neurons: Neurons) -> Tensor:
    """``fan_in_i``, the number of active weights of each neuron: int64, of shape ``(neurons,)``."""
    grid = mask.reshape(neurons.grid(mask.shape))
    if _has_words(grid):
        is_active = grid.flatten(0, 2).view(torch.uint8) != 0  # bytes of a mask may be other than 1
        return _sums_of_words(is_active.view(torch.int64))
    return grid.count_nonzero(dim=(1, 3)).flatten()


def _has_words(grid: Tensor) -> bool:
    """Tell if the rows of a mask on the CPU are whole words of 8 bytes."""
    _, segments, _, length = grid.shape
    return (
        grid.dtype == torch.bool
        and grid.device.type == "cpu"
        and segments == 1
        and length > 0
        and length % _WORD == 0
    )


def _sums_of_words(words: Tensor) -> Tensor:
    """Return the sum of all bytes of each row of words, ``(rows,)``. Bytes are 0 or 1.

    Eight bytes are added at once: 16.8 million take 1 ms, and 75 ms where PyTorch counts along a dimension
    (Xeon, one thread).
    """
    rows, count = words.shape
    whole = count - count % _WORDS_ADDED
    sums = [words[:, whole:].sum(dim=1, keepdim=True)]
    if whole:
        sums.append(words[:, :whole].view(rows, whole // _WORDS_ADDED, _WORDS_ADDED).sum(dim=2))
    return torch.cat(sums, dim=1).view(torch.uint8).sum(dim=1, dtype=torch.int64)


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """What numbers of ``dtype`` are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
