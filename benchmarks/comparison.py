"""Makes SparseOpt and its rivals on one network, checks their results, and times them on the CPU."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from last_cache import cold_timer
from networks import floor_bytes_of

from sparseopt_kernels.lab.bench.checks import WRONG, Admitted, References, admitted
from sparseopt_kernels.lab.bench.contestants import Maker, sparseopt
from sparseopt_kernels.lab.bench.network import Network, Shape
from sparseopt_kernels.lab.timing import CpuTimer, Rounds, Summary, copied_gb_per_s, copying, take_turns

OURS = "sparseopt"  # the name of this package among the contestants
THREADS = 2
Cache = Literal["hot", "cold"]
"""What a contestant finds in the caches: what the one before it left there, or nothing of any contestant."""
HOT: Cache = "hot"
COLD: Cache = "cold"
_CACHE_LINE = 64  # bytes


@dataclass(frozen=True)
class Case:
    """A network to measure.

    Args:
        network: its name in tables and files.
        shapes: of the parameters; those of two and more dimensions are masked.
        sparsity: of each masked parameter.
        dtype: of the parameters.
        options: of ``SparseOpt``, in addition to those that all contestants have.
    """

    network: str
    shapes: Sequence[Shape]
    sparsity: float
    dtype: torch.dtype = torch.float32
    options: Mapping[str, Any] = field(default_factory=dict)

    def make(self) -> Network:
        return Network.of_shapes(self.shapes, self.sparsity, dtype=self.dtype)


@dataclass(frozen=True)
class Comparison:
    """The measurements on one network at one sparsity."""

    network: str
    sparsity: float
    weights: int
    floor_bytes: int  # the least that a step of SparseOpt can touch
    copy_gb_per_s: float
    times: Mapping[str, Summary]  # by contestant
    wrong: tuple[str, ...] = ()  # contestants that are not timed, because their weights are wrong
    cache: Cache = HOT


def checked_entrants(case: Case, rivals: Iterable[Sequence[Maker]]) -> Admitted:
    """Return SparseOpt, and the first alternative of each rival whose weights are right; all are warmed up.

    Raises:
        AssertionError: the weights of SparseOpt are not those of the reference.
    """
    network = case.make()
    found = admitted(
        network, [(partial(sparseopt, **case.options),), *rivals], References(network, case.options)
    )
    if OURS in found.wrong:
        raise AssertionError(f"SparseOpt has {WRONG} on {case.network}, {case.dtype}, {case.sparsity}")
    return found


def timed(
    case: Case,
    contestants: Admitted,
    rounds: Rounds,
    steps: int = 1,
    seconds: float = math.inf,
    cache: Cache = HOT,
) -> Comparison:
    """Time the contestants in turns of ``steps`` steps. After the fewest of ``rounds``, it ends when
    ``seconds`` have passed."""
    timer = cold_timer() if cache == COLD else CpuTimer()
    gc.collect()
    ours = contestants.right[0]
    nbytes = sum(p.nbytes for p in ours.network.parameters)
    turns = {contestant.name: contestant.turn(steps) for contestant in contestants.right}
    end = time.monotonic() + seconds
    times = take_turns({**turns, "copy": copying(nbytes)}, timer, rounds, lambda: time.monotonic() > end)
    copy = times.pop("copy")
    return Comparison(
        network=case.network,
        sparsity=case.sparsity,
        weights=ours.network.numel(),
        floor_bytes=floor_bytes_of(ours, _CACHE_LINE),
        copy_gb_per_s=copied_gb_per_s(nbytes, copy),
        times=times,
        wrong=tuple(contestants.wrong),
        cache=cache,
    )


def timed_hot_and_cold(
    case: Case, contestants: Admitted, rounds: Rounds, cold_rounds: Rounds, seconds: float = math.inf
) -> Iterator[Comparison]:
    """Time single steps with hot caches and with cold ones, each for ``seconds`` at most, as in ``timed``.

    It is for networks that are larger than the caches of the cores. To empty the last cache of a large
    processor takes longer than a step of a small one.
    """
    yield timed(case, contestants, rounds, seconds=seconds)
    yield timed(case, contestants, cold_rounds, seconds=seconds, cache=COLD)
