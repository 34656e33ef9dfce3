"""Tells whether a GPU's memory delivers single sectors of 32 bytes or pairs of them.

    python benchmarks/sector_patterns.py            # by the times of steps
    python benchmarks/sector_patterns.py --ncu ncu  # by the bytes that Nsight Compute counts

A step of SparseOpt is measured on masks with the same number of live sectors, a fourth of all, so that they
are listed. The masks differ in how the live sectors lie, and so in the bytes that memory moves if it delivers
pairs: two neighbours that are a pair cost half of two neighbours that belong to two pairs, though these lie
in the same line of 128 bytes, and as far from the next ones. Each assumption says how many bytes a step moves
on each mask. The one fits that is nearest to proportional to what was measured. Times say something only if
they are those of memory: a step has to move at least half as many bytes a second as a copy.
"""

from __future__ import annotations

import argparse
import csv
import gc
import io
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.parameter import Parameter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to measure the code that is checked out

from gpu_runs import copy_bandwidth

from sparseopt_kernels.kernels import BACKENDS
from sparseopt_kernels.lab.bench.contestants import Contestant, sparseopt
from sparseopt_kernels.lab.bench.network import Network, Shape
from sparseopt_kernels.lab.timing import CudaTimer, Rounds, Timer, take_turns
from sparseopt_kernels.text_table import aligned

SHAPE = (8192, 8192)
SECTOR, LANES = 32, 8  # bytes, float32 weights
LIST_BYTES = 5.0  # of a live sector: its number and its bits
_ROUNDS = Rounds(30, warmup=5, fewest=10)
_WELL = 0.1  # the largest error of what fits
_BETTER = 1.5  # how many times larger that of others has to be
_LEAST = 0.5  # of a copy's bandwidth
LEFT_OUT = 77  # the exit status where nothing may be counted
_METRIC = "dram__bytes_read.sum"  # what is written may stay in the L2 cache


class Pattern(NamedTuple):
    """Live sectors: those at ``places`` of each ``period`` sectors."""

    period: int
    places: tuple[int, ...]

    def mask(self, shape: Shape, device: torch.device | str) -> torch.Tensor:
        mask = torch.zeros(shape, dtype=torch.bool, device=device)
        mask.view(-1, self.period, LANES)[:, list(self.places)] = True
        return mask

    def delivered(self, together: int) -> float:
        """Return how many sectors are delivered for a live one, if memory delivers ``together`` at a time."""
        return together * len({place // together for place in self.places}) / len(self.places)


PATTERNS = {
    "every fourth sector": Pattern(4, (0,)),
    "a pair of every four pairs": Pattern(8, (0, 1)),
    "neighbours of two pairs": Pattern(8, (1, 2)),
    "a line of every four lines": Pattern(16, (0, 1, 2, 3)),
}


class Memory(NamedTuple):
    """How many sectors memory reads and writes together."""

    read: int
    written: int

    def bytes_read(self, pattern: Pattern) -> float:
        """Return the bytes that a step reads for each live sector: of p, b, g and the list."""
        return 3 * SECTOR * pattern.delivered(self.read) + LIST_BYTES

    def bytes_moved(self, pattern: Pattern) -> float:
        """Return the bytes that a step reads and writes for each live sector."""
        return self.bytes_read(pattern) + 2 * SECTOR * pattern.delivered(self.written)


SINGLE, PAIRS = "single sectors", "pairs of sectors"
MEMORIES = {
    SINGLE: Memory(read=1, written=1),
    PAIRS: Memory(read=2, written=2),
    "pairs read and single sectors written": Memory(read=2, written=1),
}
Bytes = Mapping[str, Mapping[str, float]]
"""By assumption, the bytes for each live sector by pattern."""
MOVED: Bytes = {m: {n: own.bytes_moved(p) for n, p in PATTERNS.items()} for m, own in MEMORIES.items()}
READ: Bytes = {m: {n: MEMORIES[m].bytes_read(p) for n, p in PATTERNS.items()} for m in (SINGLE, PAIRS)}


class Fit(NamedTuple):
    memory: str
    error: float  # the largest deviation from proportional: 0.1 is 10%
    bytes_per_unit: float  # of what was measured, for each live sector


def fits(measured: Mapping[str, float], says: Bytes) -> list[Fit]:
    """Return how well each assumption fits what was measured by pattern, the best first."""
    found = []
    for memory, predicted in says.items():
        logs = [math.log(predicted[pattern] / figure) for pattern, figure in measured.items()]
        middle = (min(logs) + max(logs)) / 2
        found.append(Fit(memory, error=math.expm1(max(logs) - middle), bytes_per_unit=math.exp(middle)))
    return sorted(found, key=lambda fit: fit.error)


VERDICT = ("Memory delivers ", "No assumption fits: ", "Undecided: ")
"""How a verdict begins."""


def verdict(measured: Mapping[str, float], says: Bytes) -> str:
    best, second, *_ = fits(measured, says)
    if best.error > _WELL:
        return f"No assumption fits: the best, {best.memory}, is off by up to {best.error:.0%}."
    if second.error < _BETTER * best.error:
        return f"Undecided: {best.memory} or {second.memory} ({best.error:.1%} and {second.error:.1%} off)."
    return f"Memory delivers {best.memory} (up to {best.error:.1%} off; {second.memory}: {second.error:.0%})."


def verdict_by_times(milliseconds: Mapping[str, float], live_sectors: int, copy_gb_per_s: float) -> str:
    best = fits(milliseconds, MOVED)[0]
    share = best.bytes_per_unit * live_sectors / 1e6 / copy_gb_per_s
    if share < _LEAST:
        return f"Undecided: a step has {share:.2f} of the bandwidth of a copy, so its time is not memory's."
    return f"{verdict(milliseconds, MOVED)} That is {share:.2f} of the bandwidth of a copy."


def table(measured: Mapping[str, float], unit: str, says: Bytes) -> str:
    """Return what was measured beside what each assumption says, relative to the pattern of pairs."""
    base = "a pair of every four pairs"
    rows = [["mask", unit, "relative", *says]]
    for name, figure in measured.items():
        relative = (f"{predicted[name] / predicted[base]:.2f}" for predicted in says.values())
        rows.append([name, f"{figure:.4g}", f"{figure / measured[base]:.2f}", *relative])
    return "\n".join(aligned(rows))


def contestants(backend: str, device: torch.device | str, shape: Shape = SHAPE) -> dict[str, Contestant]:
    """Return the steps by pattern."""
    found = {}
    gradient = torch.randn(shape, device=device)
    for name, pattern in PATTERNS.items():
        mask = pattern.mask(shape, device)
        p = Parameter(torch.randn(shape, device=device) * mask)
        p.grad = gradient
        found[name] = sparseopt(Network([p], {p: mask}, [gradient]), backend)
    return found


def timed(backend: str, device: torch.device | str, timer: Timer, shape: Shape = SHAPE) -> dict[str, float]:
    """Return the median milliseconds of a step by pattern."""
    rivals = contestants(backend, device, shape)
    for contestant in rivals.values():
        contestant.warm_up()
    summaries = take_turns({name: own.turn() for name, own in rivals.items()}, timer, _ROUNDS)
    return {name: summary.p50_ms for name, summary in summaries.items()}


def two_steps(backend: str, device: torch.device | str) -> None:
    """Make two steps on each pattern: one with new masks, and the one that is counted."""
    for contestant in contestants(backend, device).values():
        contestant.step()
        contestant.step()
    torch.cuda.synchronize()


def counted(ncu: str, backend: str) -> dict[str, float]:
    """Return the bytes that a step reads from memory by pattern, as Nsight Compute counts them.

    Raises:
        PermissionError: users may not profile here.
        RuntimeError: it counts something else.
    """
    command = [ncu, "--csv", "--metrics", _METRIC, "--kernel-name", "regex:sector_step"]
    steps = [sys.executable, str(Path(__file__)), "--two-steps", backend]
    done = subprocess.run([*command, *steps], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if "ERR_NVGPUCTRPERM" in done.stdout:
        raise PermissionError("no permission to profile (ERR_NVGPUCTRPERM)")
    return bytes_by_pattern(done.stdout)


def bytes_by_pattern(output: str) -> dict[str, float]:
    """Read the table that Nsight Compute prints: a row for each launch, in order."""
    lines = output.splitlines()
    header = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    launches = []
    for row in csv.DictReader(io.StringIO("\n".join(lines[header:]))):
        if row.get("Metric Name") == _METRIC:
            scale = {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}[row["Metric Unit"]]
            launches.append(float(row["Metric Value"].replace(",", "")) * scale)
    if len(launches) != len(PATTERNS):
        said = "\n".join(lines[:header])  # without the table, which has the name of the machine
        raise RuntimeError(f"{len(launches)} launches were counted, not {len(PATTERNS)}:\n{said}")
    return dict(zip(PATTERNS, launches, strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Does memory deliver single sectors or pairs of them?")
    parser.add_argument("--ncu", metavar="PATH", help="count bytes by this Nsight Compute, in place of times")
    parser.add_argument("--two-steps", metavar="BACKEND", help="make the steps that are counted, and no more")
    options = parser.parse_args(arguments)
    device = torch.device("cuda")
    if options.two_steps:
        two_steps(options.two_steps, device)
        return 0
    backends = [name for name in ("triton", "cuda") if BACKENDS[name].unavailable(device) is None]
    if not backends:
        print("No backend of SparseOpt runs on this device: nothing was measured.")
        return 1
    timer = CudaTimer(device)
    copy = math.nan if options.ncu else copy_bandwidth(timer, device)
    for backend in backends:
        print(f"backend {backend!r}, {SHAPE[0]}x{SHAPE[1]}, a fourth of the sectors live", flush=True)
        if options.ncu:
            try:
                read = counted(options.ncu, backend)
            except PermissionError as error:
                print(error)
                return LEFT_OUT
            print(table(read, "bytes read", READ), verdict(read, READ), sep="\n", flush=True)
        else:
            times = timed(backend, device, timer)
            print(table(times, "median ms", MOVED))
            print(verdict_by_times(times, math.prod(SHAPE) // LANES // 4, copy), flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
