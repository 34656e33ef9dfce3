"""Times contestants on a CPU or a GPU.

They take turns within one process, so that slow drifts of the machine's speed meet all of them. The order of
a round is random, because each contestant finds the caches as the one before it left them.

Only ``CudaTimer`` needs a GPU. The contestants are defined by the callers: the benchmarks and the demo.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from random import Random
from statistics import median, quantiles
from typing import Any, NamedTuple, Protocol

import torch

QUIET = 0.85  # the least share of a processor with which times are believed
_PROBE_SECONDS = 0.5
_EVICTING = 256 << 20  # bytes that are read between steps, at least
_LEAD_MS = 10.0  # how long the device is kept busy until the host's time for a step is known


class Timing(NamedTuple):
    """The time of a step on the device, and of its call on the host; on a CPU both are the same."""

    device_ms: float
    host_ms: float


class Timer(Protocol):
    def __call__(self, step: Callable[[], object], busy_ms: float) -> Timing:
        """Time one call of ``step``. A GPU is kept busy with other memory for about ``busy_ms`` first."""


class CpuTimer:
    def __call__(self, step: Callable[[], object], busy_ms: float = 0.0) -> Timing:
        start = time.perf_counter()
        step()
        taken = 1e3 * (time.perf_counter() - start)
        return Timing(taken, taken)


class CudaTimer:
    """A timer that measures a step on the device by CUDA events, and its call on the host.

    Before each step it reads a buffer larger than the L2 cache: that evicts the step's data, and leaves
    nothing to be written back. The reads are repeated to keep the device busy until the host has issued the
    whole step, so that the time between the events is the device's alone.
    """

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._buffer = torch.zeros(max(_EVICTING, 4 * cache) // 4, device=device)
        event: Any = torch.cuda.Event  # not annotated in PyTorch
        self._start, self._end = event(enable_timing=True), event(enable_timing=True)
        self._read_ms = 1.0
        self._read_ms = median(self(self._buffer.sum, busy_ms=1.0).device_ms for _ in range(9))

    def __call__(self, step: Callable[[], object], busy_ms: float) -> Timing:
        for _ in range(min(200, 1 + math.ceil(busy_ms / self._read_ms))):  # the launch queue holds a thousand
            self._buffer.sum()
        self._start.record()
        before = time.perf_counter()
        step()
        host = time.perf_counter() - before
        self._end.record()
        self._end.synchronize()
        return Timing(self._start.elapsed_time(self._end), 1e3 * host)


def timer_for(device: torch.device) -> Timer:
    """Return the timer of a CPU or CUDA device."""
    return CudaTimer(device) if device.type == "cuda" else CpuTimer()


class Turn(NamedTuple):
    """The part of one contestant in a round."""

    step: Callable[[], object]
    prepare: Callable[[], object] = lambda: None  # not timed
    steps: int = 1  # steps in a row that are timed together


class Rounds(NamedTuple):
    timed: int
    warmup: int  # rounds before the timed ones
    fewest: int = 2  # timed rounds that are made even if time is up


class Summary(NamedTuple):
    """Quantiles of the time of one step on the device, and the median time of its call on the host."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    host_ms: float
    rounds: int

    @classmethod
    def of(cls, timings: Sequence[Timing], steps: int = 1) -> Summary:
        """Summarize two or more timings, each of ``steps`` steps."""
        tenths = quantiles([timing.device_ms / steps for timing in timings], n=10, method="inclusive")
        host = median(timing.host_ms / steps for timing in timings)
        return cls(p20_ms=tenths[1], p50_ms=tenths[4], p80_ms=tenths[7], host_ms=host, rounds=len(timings))


def speed(own: Summary, rival: Summary) -> str:
    """Return how fast a step is compared with another's, as the middle of a sentence "it is ... <the other>".

    Two steps differ if the middle 60% of their times do not overlap.
    """
    if own.p80_ms < rival.p20_ms:
        return f"{rival.p50_ms / own.p50_ms:.1f} times as fast as"
    if rival.p80_ms < own.p20_ms:
        return f"slower ({own.p50_ms / rival.p50_ms:.2f} times as long) than"
    return "within noise as fast as"


def take_turns(
    turns: Mapping[str, Turn], timer: Timer, rounds: Rounds, is_over: Callable[[], bool] = lambda: False
) -> dict[str, Summary]:
    """Time each contestant once in each round and return the summaries by name.

    Args:
        turns: by the contestants' names.
        timer: times a turn.
        rounds: the number of rounds; at least two are timed.
        is_over: called before each round after the first ``rounds.fewest``; True ends the measurement.
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
    """Return the share of a processor that other programs leave, in [0, 1]: the processor time of a thread
    that only computes, divided by the time that passes."""
    start, used = time.perf_counter(), time.thread_time()
    while time.perf_counter() - start < _PROBE_SECONDS:
        pass
    return min(1.0, (time.thread_time() - used) / (time.perf_counter() - start))


def copying(nbytes: int, device: torch.device | str = "cpu") -> Turn:
    """Return a turn that copies ``nbytes`` within the device's memory, as the measure of its bandwidth."""
    source = torch.ones(nbytes // 4, device=device)
    target = torch.empty_like(source)
    return Turn(lambda: target.copy_(source))


def copied_gb_per_s(nbytes: int, copy: Summary) -> float:
    """Return the bandwidth of the turns of ``copying`` in GB/s, reads and writes together."""
    return 2 * nbytes / copy.p50_ms / 1e6
