"""Times contestants on a CPU or a GPU. They take turns within one process, because machines are noisy and the
noise lasts: each round times one turn of each, in random order, because whoever comes after another finds
in the caches what that one left there.

Nothing here asks for a GPU but ``CudaTimer``. Who the contestants are is not known here: the benchmarks and
the demo have their own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from random import Random
from statistics import median, quantiles
from typing import Any, NamedTuple, Protocol

import torch

QUIET = 0.85  # of a processor, at least, for times to be believed
_PROBE_SECONDS = 0.5
_EVICTING = 256 << 20  # bytes that are read between steps, at least
_LEAD_MS = 10.0  # before it is known how long the host takes to issue a step


class Timing(NamedTuple):
    """What a step takes on the device, and how long its call takes on the host: on a CPU, the same."""

    device_ms: float
    host_ms: float


class Timer(Protocol):
    def __call__(self, step: Callable[[], object], busy_ms: float) -> Timing:
        """Time one call of ``step``, after keeping the device busy with other memory for about ``busy_ms``,
        if it is a device of its own."""


class CpuTimer:
    def __call__(self, step: Callable[[], object], busy_ms: float = 0.0) -> Timing:
        start = time.perf_counter()
        step()
        taken = 1e3 * (time.perf_counter() - start)
        return Timing(taken, taken)


class CudaTimer:
    """What a step takes on the device, by CUDA events, and how long its call takes on the host.

    Before it, a buffer larger than the cache is read: that evicts what a step could find there, and leaves
    nothing to be written back. It is read as often as keeps the device busy until the host has issued the
    whole step, so that the time between the events is the device's alone.
    """

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._buffer = torch.zeros(max(_EVICTING, 4 * cache) // 4, device=device)
        event: Any = torch.cuda.Event  # its type is not told
        self._start, self._end = event(enable_timing=True), event(enable_timing=True)
        self._read_ms = 1.0
        self._read_ms = median(self(self._buffer.sum, busy_ms=1.0).device_ms for _ in range(9))

    def __call__(self, step: Callable[[], object], busy_ms: float) -> Timing:
        for _ in range(min(200, 1 + math.ceil(busy_ms / self._read_ms))):  # a queue has room for a thousand
            self._buffer.sum()
        self._start.record()
        before = time.perf_counter()
        step()
        host = time.perf_counter() - before
        self._end.record()
        self._end.synchronize()
        return Timing(self._start.elapsed_time(self._end), 1e3 * host)


class Turn(NamedTuple):
    """What a contestant does in a round."""

    step: Callable[[], object]
    prepare: Callable[[], object] = lambda: None  # not timed
    steps: int = 1  # in a row, timed as one


class Rounds(NamedTuple):
    timed: int
    warmup: int  # before them, not counted
    fewest: int = 2  # of the timed ones, even if time is up


class Summary(NamedTuple):
    """Quantiles of the time of one step on the device, and the median of what its call takes on the host."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    host_ms: float
    rounds: int

    @classmethod
    def of(cls, timings: Sequence[Timing], steps: int = 1) -> Summary:
        """Of two timings or more, of so many steps each."""
        tenths = quantiles([timing.device_ms / steps for timing in timings], n=10, method="inclusive")
        host = median(timing.host_ms / steps for timing in timings)
        return cls(tenths[1], tenths[4], tenths[7], host, len(timings))


def speed(own: Summary, rival: Summary) -> str:
    """Say how fast a step is beside another's: "it is ... <the other>" makes a sentence.

    Two steps differ if the middle 60% of their times have nothing in common.
    """
    if own.p80_ms < rival.p20_ms:
        return f"{rival.p50_ms / own.p50_ms:.1f} times as fast as"
    if rival.p80_ms < own.p20_ms:
        return f"slower ({own.p50_ms / rival.p50_ms:.2f} times as long) than"
    return "within noise as fast as"


def take_turns(
    turns: Mapping[str, Turn], timer: Timer, rounds: Rounds, is_over: Callable[[], bool] = lambda: False
) -> dict[str, Summary]:
    """Let each contestant have its turn in each round.

    Args:
        turns: by the contestants' names.
        timer: times a turn.
        rounds: how many; two timed ones at least.
        is_over: asked before each round once there were enough; if time is up, there are no more.
    """
    taken: dict[str, list[Timing]] = {name: [] for name in turns}
    order = Random(0)
    for done in range(rounds.warmup + rounds.timed):
        if done >= rounds.warmup + rounds.fewest and is_over():
            break
        for name, turn in order.sample([*turns.items()], len(turns)):
            own = taken[name]
            turn.prepare()
            # Twice what the host needs to issue the steps.
            own.append(timer(_in_a_row(turn), 2 * median(t.host_ms for t in own) if own else _LEAD_MS))
    return {name: Summary.of(own[rounds.warmup :], turns[name].steps) for name, own in taken.items()}


def _in_a_row(turn: Turn) -> Callable[[], object]:
    def steps() -> None:
        for _ in range(turn.steps):
            turn.step()

    return turn.step if turn.steps == 1 else steps


def processor_share() -> float:
    """What other programs leave: the time on a processor of a thread that does nothing but compute, as part
    of the time that passes."""
    start, used = time.perf_counter(), time.thread_time()
    while time.perf_counter() - start < _PROBE_SECONDS:
        pass
    return min(1.0, (time.thread_time() - used) / (time.perf_counter() - start))


def copying(nbytes: int, device: torch.device | str = "cpu") -> Turn:
    """Copy so many bytes within the device's memory: what any other step's traffic is compared with."""
    source = torch.ones(nbytes // 4, device=device)
    target = torch.empty_like(source)
    return Turn(lambda: target.copy_(source))


def copied_gb_per_s(nbytes: int, copy: Summary) -> float:
    """GB/s, read and written, of the turns of ``copying``."""
    return 2 * nbytes / copy.p50_ms / 1e6
