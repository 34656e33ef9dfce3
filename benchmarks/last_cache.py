"""Empties a CPU's last cache, whatever its size, so that no contestant finds there what another left."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from sparseopt_kernels.lab.timing import CpuTimer, Timing

_LEVELS = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_IF_UNKNOWN = 1 << 30  # bytes that are read if no size is known
# A cache need not replace the oldest lines first, so twice its size is read.
_TIMES = 2


def last_cache_bytes(levels: Path = _LEVELS) -> int | None:
    """Return the size of the largest cache of the first core, or None where the system does not tell it.

    Args:
        levels: a folder with a folder for each cache, whose file ``size`` is such as ``491520K``.
    """
    sizes = []
    for path in levels.glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip())
        if match is not None:
            sizes.append(int(match[1]) * _UNITS[match[2]])
    return max(sizes, default=0) or None


class ColdCpuTimer:
    """A timer that empties the caches before each turn: it reads a buffer, and so leaves nothing to be
    written back while the turn is timed."""

    def __init__(self, cache_bytes: int | None) -> None:
        nbytes = _IF_UNKNOWN if cache_bytes is None else _TIMES * cache_bytes
        self.buffer = torch.ones(nbytes // 4)  # written: memory that never was is one page of zeros
        self._timer = CpuTimer()

    def __call__(self, step: Callable[[], object], busy_ms: float = 0.0) -> Timing:
        self.buffer.sum()
        return self._timer(step, busy_ms)


@cache
def cold_timer() -> ColdCpuTimer:
    """Return the timer for this machine."""
    return ColdCpuTimer(last_cache_bytes())
