"""Times steps on a GPU: the contestants, the clock, and the rounds in which they take turns.

Nothing here asks for a GPU but ``CudaTimer`` and ``replayed``. What becomes of the rows is in ``gpu_report``.
"""

from __future__ import annotations

import gc
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from statistics import median, quantiles
from typing import Any, NamedTuple, Protocol

import torch
from contestants import Contestant, Network, compiled_function, eager_chain, sgd_fused, sparseopt
from networks import Shape
from torch import Tensor

SGD_FUSED = "SGD fused, no mask"
OURS = "SparseOpt "  # how the names of this package's contestants begin
OK, LEFT_OUT, NO_MEMORY, WRONG = "ok", "left out: no time", "left out: no memory", "wrong results"
_LATE = "gave up: not ready after "
_STEPS = 5  # of each contestant before it is compared with the reference
_TO_BE_READY = 75.0  # seconds
_ROUNDS, _WARMUP, _FEWEST = 50, 5, 10
_EVICTING = 256 << 20  # bytes that are read between steps, at least
_RESERVE = 40.0  # seconds: more than the rest of the report takes after the last deadline was looked at

Maker = Callable[[Network], Contestant]


class Run(NamedTuple):
    network: str
    shapes: Sequence[Shape]
    sparsity: float


class Timing(NamedTuple):
    device_ms: float
    host_ms: float


class Timer(Protocol):
    def __call__(self, step: Callable[[], object], busy_ms: float) -> Timing:
        """Time one step, after keeping the device busy with other memory for about ``busy_ms``."""


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


class Deadline:
    def __init__(self, seconds: float) -> None:
        self._start, self._seconds = time.monotonic(), seconds

    def elapsed(self) -> float:
        return time.monotonic() - self._start

    def left(self) -> float:
        """The seconds left for measuring."""
        return self._seconds - _RESERVE - self.elapsed()


@dataclass(frozen=True)
class Result:
    """What was measured of one contestant; nothing was if the status is not ``OK``."""

    network: str
    weights: int
    sparsity: float
    contestant: str
    status: str = OK
    median_ms: float = math.nan
    p20_ms: float = math.nan
    p80_ms: float = math.nan
    host_ms: float = math.nan
    bytes: float = math.nan
    copy_gb_per_s: float = math.nan

    def fraction_of_copy_bandwidth(self) -> float:
        return self.bytes / (1e6 * self.median_ms) / self.copy_gb_per_s

    def is_late(self) -> bool:
        return self.status.startswith(_LATE)


def makers_for(backends: Sequence[str], graphs: bool = True) -> dict[str, Maker]:
    """The contestants by name: each backend, called and replayed from a CUDA graph, and what PyTorch has."""
    makers: dict[str, Maker] = {OURS + name: partial(sparseopt, backend=name) for name in backends}
    if graphs:
        makers |= {f"{OURS}{name}, graph": partial(replayed, backend=name) for name in backends}
    return {
        **makers,
        SGD_FUSED: sgd_fused,
        "SGD foreach, masked chain": eager_chain,
        "SGD fused, masked chain": partial(eager_chain, fused=True),
        "torch.compile of the chain": compiled_function,
    }


def replayed(network: Network, backend: str) -> Contestant:
    """The step of ``sparseopt``, captured in a CUDA graph."""
    eager = sparseopt(network, backend)
    steps = 3
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(steps):
            eager.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        eager.step()
    return Contestant("graph", network, graph.replay, steps_made=steps)


def copy_bandwidth(timer: Timer, device: torch.device, nbytes: int = 1 << 30) -> float:
    """GB/s, read and written, of copying so many bytes within the device's memory."""
    source = torch.zeros(nbytes // 4, device=device)
    target = torch.empty_like(source)
    taken = [timer(lambda: target.copy_(source), busy_ms=1.0).device_ms for _ in range(25)]
    return 2 * source.nbytes / median(taken[5:]) / 1e6


def measure(
    runs: Sequence[Run],
    makers: Mapping[str, Maker],
    timer: Timer,
    device: torch.device,
    copy_gb_per_s: float,
    deadline: Deadline,
) -> list[Result]:
    """Time the contestants on each network and sparsity, until the deadline; the rest is left out."""
    from tqdm import tqdm  # the report says what to install, before it comes here

    results: list[Result] = []
    with tqdm(runs, unit="run") as progress:
        for run in progress:
            progress.set_description(f"{run.network}, sparsity {run.sparsity}")
            # Who was late once need not be waited for again.
            known = {r.contestant: r.status for r in results if r.network == run.network and r.is_late()}
            try:
                found = _compare(run, makers, known, timer, device, deadline)
            except Exception as error:
                found = {name: {"status": _status(error)} for name in makers}
            weights = sum(map(math.prod, run.shapes))
            for name in makers:
                result = Result(run.network, weights, run.sparsity, name, **found[name])
                results.append(replace(result, copy_gb_per_s=copy_gb_per_s))
            _free_memory()
    return results


def _compare(
    run: Run,
    makers: Mapping[str, Maker],
    known: Mapping[str, str],
    timer: Timer,
    device: torch.device,
    deadline: Deadline,
) -> dict[str, dict[str, Any]]:
    """Fields of the results, by contestant. Only those that agree with the reference are timed."""
    found: dict[str, dict[str, Any]] = {name: {"status": LEFT_OUT} for name in makers}
    if deadline.left() <= 0:
        return found
    network = Network.of_shapes(run.shapes, run.sparsity, "erk", device)
    reference = _warmed_up(partial(sparseopt, backend="reference"), network)
    want = [p.detach() for p in reference.network.parameters]
    del reference
    rivals: dict[str, Contestant] = {}
    for name, make in makers.items():
        if name in known:
            found[name] = {"status": known[name]}
        elif deadline.left() > 0:
            try:
                with _at_most(min(_TO_BE_READY, deadline.left())):
                    contestant = _warmed_up(make, network)
                if name != SGD_FUSED:
                    _check(contestant, want)
                rivals[name] = contestant
            except (Exception, NotReadyError) as error:
                found[name] = {"status": _status(error)}
                torch._dynamo.reset()
    del want
    for name, taken in _take_turns(rivals, timer, deadline).items():
        found[name] = {**_summary(taken), "bytes": _floor(network, name)}
    return found


def _summary(taken: Sequence[Timing]) -> dict[str, float]:
    times = [timing.device_ms for timing in taken]
    tenths = quantiles(times, n=10, method="inclusive")
    host = median(timing.host_ms for timing in taken)
    return {"median_ms": median(times), "p20_ms": tenths[1], "p80_ms": tenths[7], "host_ms": host}


def _floor(network: Network, name: str) -> int:
    """In sectors of 32 bytes. The one contestant without a mask must move all of it."""
    masks = {} if name == SGD_FUSED else network.masks
    return Network(network.parameters, masks, network.gradients).floor_bytes(line=32)


def _warmed_up(make: Maker, network: Network) -> Contestant:
    contestant = make(network.copy())
    for _ in range(_STEPS - contestant.steps_made):
        contestant.prepare()
        contestant.step()
    if network.parameters[0].is_cuda:
        torch.cuda.synchronize()  # errors of the device are this contestant's
    return contestant


def _check(contestant: Contestant, want: Sequence[Tensor]) -> None:
    for p, q in zip(contestant.network.parameters, want, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-4, atol=1e-5)


def _take_turns(
    rivals: Mapping[str, Contestant], timer: Timer, deadline: Deadline
) -> dict[str, list[Timing]]:
    """One step of each in a round."""
    taken: dict[str, list[Timing]] = {name: [] for name in rivals}
    for done in range(_WARMUP + _ROUNDS):
        if done >= _WARMUP + _FEWEST and deadline.left() <= 0:
            break
        for name, contestant in rivals.items():
            own = taken[name]
            contestant.prepare()
            own.append(timer(contestant.step, 2 * median(t.host_ms for t in own) if own else 10.0))
    return {name: own[_WARMUP:] for name, own in taken.items()}


class NotReadyError(BaseException):  # no Exception: what compiles may catch those
    """A contestant took too long before its first timed step."""


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise ``NotReadyError`` in the block after so many seconds, where the system has alarms."""

    def stop(*_: object) -> None:
        raise NotReadyError(f"{_LATE}{seconds:.0f} s")

    if not hasattr(signal, "SIGALRM"):
        yield
        return
    former = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def _status(error: BaseException) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return NO_MEMORY
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, NotReadyError):
        return lines[0]
    if isinstance(error, AssertionError) and "not close" in lines[0]:
        return WRONG
    return f"failed: {type(error).__name__}: {lines[0]}"[:200]


def _free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()
