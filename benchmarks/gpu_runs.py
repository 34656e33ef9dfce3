"""Measures the contestants of the GPU report on each network and sparsity, until time is up.

Only ``replayed`` needs a GPU. ``timing`` times the steps, ``gpu_report`` prints and writes the results.
"""

from __future__ import annotations

import gc
import math
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from compiled_chains import compiled_function
from networks import floor_bytes_of

from sparseopt_kernels.lab.bench.checks import WRONG, References
from sparseopt_kernels.lab.bench.contestants import Contestant, Maker, eager_chain, sgd, sparseopt
from sparseopt_kernels.lab.bench.network import Network, Shape
from sparseopt_kernels.lab.timing import Rounds, Timer, copied_gb_per_s, copying, take_turns

SGD_FUSED, SGD_FOREACH = "SGD fused, no mask", "SGD foreach, no mask"
OURS = "SparseOpt "  # the prefix of the names of this package's contestants
OK, LEFT_OUT, NO_MEMORY = "ok", "left out: no time", "left out: no memory"
_LATE = "gave up: not ready after "
_TO_BE_READY = 75.0  # seconds
_ROUNDS = Rounds(50, warmup=5, fewest=10)
_COPIES = Rounds(20, warmup=5)
_SECTOR = 32  # bytes
_RESERVE = 40.0  # seconds: more than the report takes after the last look at the deadline


class Run(NamedTuple):
    network: str
    shapes: Sequence[Shape]
    sparsity: float


class Deadline:
    def __init__(self, seconds: float) -> None:
        self._start, self._seconds = time.monotonic(), seconds

    def elapsed(self) -> float:
        return time.monotonic() - self._start

    def left(self) -> float:
        """Return the seconds left for measuring."""
        return self._seconds - _RESERVE - self.elapsed()


@dataclass(frozen=True)
class Result:
    """The measurements of one contestant; they are NaN if the status is not ``OK``."""

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
    """Return the contestants by name: each backend, called and replayed from a CUDA graph, and PyTorch's."""
    makers: dict[str, Maker] = {OURS + name: partial(sparseopt, backend=name) for name in backends}
    if graphs:
        makers |= {f"{OURS}{name}, graph": partial(replayed, backend=name) for name in backends}
    return {
        **makers,
        SGD_FUSED: sgd,
        SGD_FOREACH: partial(sgd, implementation="foreach"),
        "SGD foreach, masked chain": eager_chain,
        "SGD fused, masked chain": partial(eager_chain, implementation="fused"),
        "torch.compile of the chain": compiled_function,
    }


def replayed(network: Network, backend: str) -> Contestant:
    """Return the step of ``sparseopt``, captured in a CUDA graph."""
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

    def replay() -> Contestant:
        """Replay the graph. The closure keeps the optimizer alive, whose momentum the graph reads."""
        graph.replay()
        return eager

    return Contestant(name="graph", network=network, step=replay, steps_made=steps)


def copy_bandwidth(timer: Timer, device: torch.device, nbytes: int = 1 << 30) -> float:
    """Return the bandwidth of a copy within the device's memory in GB/s, reads and writes together."""
    copy = take_turns({"copy": copying(nbytes, device)}, timer, _COPIES)["copy"]
    return copied_gb_per_s(nbytes, copy)


def measure(
    runs: Sequence[Run],
    makers: Mapping[str, Maker],
    timer: Timer,
    device: torch.device,
    copy_gb_per_s: float,
    deadline: Deadline,
) -> list[Result]:
    """Time the contestants on each network and sparsity, until the deadline; the rest is left out."""
    from tqdm import tqdm  # the report has checked that it is installed

    results: list[Result] = []
    with tqdm(runs, unit="run") as progress:
        for run in progress:
            progress.set_description(f"{run.network}, sparsity {run.sparsity}")
            # A contestant that was late is not tried again on the same network.
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
    """Return the fields of the results by contestant. Only those that agree with the reference are timed."""
    found: dict[str, dict[str, Any]] = {name: {"status": LEFT_OUT} for name in makers}
    if deadline.left() <= 0:
        return found
    network = Network.of_shapes(run.shapes, run.sparsity, "erk", device)
    references = References(network)
    rivals: dict[str, Contestant] = {}
    for name, make in makers.items():
        if name in known:
            found[name] = {"status": known[name]}
        elif deadline.left() > 0:
            try:
                with _at_most(min(_TO_BE_READY, deadline.left())):
                    contestant = make(network.copy())
                    contestant.warm_up()
                if references.are_met_by(contestant):
                    rivals[name] = contestant
                else:
                    found[name] = {"status": WRONG}
            except (Exception, NotReadyError) as error:
                found[name] = {"status": _status(error)}
                torch._dynamo.reset()
    del references
    turns = {name: contestant.turn() for name, contestant in rivals.items()}
    for name, times in take_turns(turns, timer, _ROUNDS, lambda: deadline.left() <= 0).items():
        found[name] = {
            **{"median_ms": times.p50_ms, "p20_ms": times.p20_ms, "p80_ms": times.p80_ms},
            **{"host_ms": times.host_ms, "bytes": floor_bytes_of(rivals[name], _SECTOR)},
        }
    return found


class NotReadyError(BaseException):  # not an Exception, because compilers may catch those
    """A contestant took too long before its first timed step."""


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise ``NotReadyError`` in the block after ``seconds``, on systems that have alarms."""

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
    return f"failed: {type(error).__name__}: {lines[0]}"[:200]


def _free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()
