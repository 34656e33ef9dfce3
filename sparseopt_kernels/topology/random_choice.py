"""Uniform random choices, the same in PyTorch and in the native library.

A choice depends on a seed alone. The numbers are those of SplitMix64, computed here with PyTorch's integers
and in ``csrc/cpu/random_choice.h`` in C++, because PyTorch's own draws differ from release to release.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native_library
from ..splitmix import logical_shift, splitmix64


def draw_seed(generator: torch.Generator) -> int:
    """Draw a seed for the functions below, in [0, 2**63), from a generator of the CPU."""
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_(generator=generator))


def choose_random(size: int, k: int, seed: int) -> Tensor:
    """Choose ``k`` of ``size`` places, all equally likely: boolean, of shape ``(size,)``, on the CPU.

    Memory beside the result is taken for the ``k`` chosen places, or for the ``size - k`` others.
    """
    if not native_library.MISSING:
        chosen = torch.empty(size, dtype=torch.bool, device="cpu")
        native_library.choose_random(chosen.data_ptr(), size, k, seed)
        return chosen
    most = 2 * k > size  # then it is quicker to choose the others
    chosen = add_random(torch.zeros(size, dtype=torch.bool, device="cpu"), size - k if most else k, seed)
    return ~chosen if most else chosen


def add_random(taken: Tensor, k: int, seed: int) -> Tensor:
    """Return ``taken`` and the first ``k`` places that are not taken in the sequence of the seed.

    The fewer places are free, the longer it takes: half of them should be at the end.

    Args:
        taken: boolean, one-dimensional, on any device; not written.
        k: at most the number of places that are not taken.
        seed: in [0, 2**63).
    """
    taken = taken.clone()
    missing, drawn = k, 0
    full = int(taken.count_nonzero()) + k
    while missing:
        # Each may fill a gap, and so none is one too many.
        places = random_places(seed, drawn, missing, taken.numel())
        taken[places.to(taken.device)] = True
        drawn += missing
        missing = full - int(taken.count_nonzero())
    return taken


def random_places(seed: int, first: int, count: int, size: int) -> Tensor:
    """Return the numbers ``first`` to ``first + count - 1`` of a seed's sequence: int64, in [0, ``size``).

    They are the remainders of 63 bits: no place is likelier than another by more than ``size / 2**63``.
    """
    x = splitmix64(seed, torch.arange(first, first + count, device="cpu"))
    return logical_shift(x, 1).remainder_(size)
