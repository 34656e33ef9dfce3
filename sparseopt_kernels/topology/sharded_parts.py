"""What a rank counts and chooses of its part of a sharded layer: natively, or in PyTorch.

Scores are compared by their keys: unsigned integers in the order of the scores. Ranks that search together
have keys of as many bits, whichever of the two they use.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .. import native_library
from ..kernels.memory import DTYPE_NAMES
from ..splitmix import logical_shift
from .selection import comparable

DIGIT_BITS = 11
_LEAST = -(1 << 63)


class Asked(NamedTuple):
    """What is to be chosen of one layer."""

    values: Tensor
    """Of the weights of this rank: their magnitudes are the scores, unless ``signed``."""
    candidates: Tensor
    """Boolean, of the shape of the values."""
    k: int
    """The number of weights to choose of the whole layer, at most that of all candidates."""
    first: Tensor | None = None
    """Of equal scores, these come before the others."""
    signed: bool = False


class Part(Protocol):
    """The part of a layer that is on this rank."""

    device: torch.device

    @property
    def key_bits(self) -> int:
        """The number of bits of a key."""

    def counts(self, prefix: int, left: int) -> Tensor:
        """Count candidates by their next digit: int64, of shape ``(2048,)``, on the CPU.

        Counted are those whose keys begin with ``prefix``; ``left`` bits of a key are not in it.
        """

    def mark(self, threshold: int) -> tuple[int, int]:
        """Take this key for the threshold. Return how many candidates have it: in ``first``, and others."""

    def chosen(self, preferred: int, others: int) -> Tensor:
        """Return True for candidates above the threshold, and for so many of those that have it."""


def supports(asked: Asked) -> bool:
    """Tell if the native library can search there."""
    return (
        not native_library.MISSING
        and not asked.signed
        and asked.values.device.type == "cpu"
        and asked.values.dtype in DTYPE_NAMES
    )


class NativePart:
    """By the native library. The first two digits take a pass over the part each, and marking another one."""

    def __init__(self, asked: Asked) -> None:
        self.device = asked.values.device
        self._shape = asked.values.shape
        first = None if asked.first is None else asked.first.contiguous()
        self._held = [asked.values.contiguous(), asked.candidates.contiguous(), first]
        values, candidates, _ = self._held
        assert values is not None
        assert candidates is not None
        self._search = native_library.DigitSearch(
            dtype=DTYPE_NAMES[values.dtype],
            values=values.data_ptr(),
            candidates=candidates.data_ptr(),
            first=0 if first is None else first.data_ptr(),
            numel=values.numel(),
        )

    @property
    def key_bits(self) -> int:
        return self._search.key_bits

    def counts(self, prefix: int, left: int) -> Tensor:
        return torch.tensor(self._search.counts(prefix, left, torch.get_num_threads()), dtype=torch.int64)

    def mark(self, threshold: int) -> tuple[int, int]:
        self._chosen = torch.empty(self._shape, dtype=torch.uint8)
        return self._search.mark(threshold, self._chosen.data_ptr(), torch.get_num_threads())

    def chosen(self, preferred: int, others: int) -> Tensor:
        self._search.choose(self._chosen.data_ptr(), preferred, others)
        return self._chosen.view(torch.bool)


class TorchPart:
    """In PyTorch, for any tensors."""

    def __init__(self, asked: Asked) -> None:
        if asked.values.is_complex():
            asked = asked._replace(values=asked.values.abs())
        self.device = asked.values.device
        self._asked = asked
        dtype = asked.values.dtype
        self._wraps = asked.signed and (dtype == torch.float64 or not dtype.is_floating_point)
        self.key_bits = 64 if self._wraps else dtype.itemsize * 8 if not asked.signed else 32

    def counts(self, prefix: int, left: int) -> Tensor:
        keys = self._keys()[self._asked.candidates]
        if left < self.key_bits:
            keys = keys[_shifted(keys, left) == prefix]
        digits = _shifted(keys, max(0, left - DIGIT_BITS)).bitwise_and_((1 << min(left, DIGIT_BITS)) - 1)
        return torch.bincount(digits, minlength=1 << DIGIT_BITS).cpu()

    def mark(self, threshold: int) -> tuple[int, int]:
        keys, candidates, first = self._keys(), self._asked.candidates, self._asked.first
        if self._wraps:  # int64 has no unsigned comparison
            keys, threshold = keys ^ _LEAST, threshold + _LEAST
        self._above = (keys > threshold) & candidates
        tied = (keys == threshold) & candidates
        preferred = torch.zeros_like(tied) if first is None else tied & first
        self._ties = preferred, tied & ~preferred
        both = torch.stack([own.count_nonzero() for own in self._ties]).tolist()
        return both[0], both[1]

    def chosen(self, preferred: int, others: int) -> Tensor:
        chosen = self._above.contiguous()
        for ties, share in zip(self._ties, (preferred, others), strict=True):
            chosen.view(-1)[ties.flatten().nonzero().flatten()[:share]] = True
        return chosen

    def _keys(self) -> Tensor:
        """Return the keys as int64, those of 64 bits as their bits."""
        values = self._asked.values
        if not self._asked.signed:
            integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.dtype.itemsize]
            return (values.abs().contiguous().view(integers).long() + 1).masked_fill(values.isnan(), 0)
        if not values.is_floating_point():
            return values.long() ^ _LEAST
        score = comparable(values)
        wide = (score if self._wraps else score.float()) + 0.0  # -0.0 becomes 0.0
        bits = wide.contiguous().view(torch.int64 if self._wraps else torch.int32)
        ordered = torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits).long()
        return ordered ^ _LEAST if self._wraps else ordered + (1 << 31)


def _shifted(keys: Tensor, bits: int) -> Tensor:
    return logical_shift(keys, bits) if bits else keys.clone()
