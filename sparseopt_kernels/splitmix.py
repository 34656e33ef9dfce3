"""SplitMix64 in PyTorch's integers, for random choices and hashes that are the same on every device.

Imports nothing of this package.
"""

from __future__ import annotations

from torch import Tensor


def splitmix64(seed: int, places: Tensor) -> Tensor:
    """Return the numbers of a seed's sequence at these places (int64, from 0 on): all 64 bits, as int64."""
    x = (places + 1).mul_(_signed(0x9E3779B97F4A7C15)).add_(seed)
    x = (x ^ logical_shift(x, 30)).mul_(_signed(0xBF58476D1CE4E5B9))
    x = (x ^ logical_shift(x, 27)).mul_(_signed(0x94D049BB133111EB))
    return x ^ logical_shift(x, 31)


def logical_shift(x: Tensor, bits: int) -> Tensor:
    """Shift the bits of int64 to the right, and zeros in from the left (``>>`` repeats the sign)."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64)
