"""What becomes of the times of a step on a CPU: a table to read, and rows of a CSV that is added to."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

from sparseopt_kernels import __version__, build_info
from sparseopt_kernels.machine import machine
from sparseopt_kernels.text_table import aligned
from sparseopt_kernels.timing import Summary

THREADS = 2
OURS = "sparseopt"
COLUMNS = (
    *("date", "version", "torch", "machine", "threads", "isa", "network", "weights", "sparsity"),
    *("floor_bytes", "copy_gb_per_s", "contestant", "p20_ms", "p50_ms", "p80_ms", "rounds"),
)


@dataclass(frozen=True)
class Comparison:
    """What was measured on one network at one sparsity."""

    network: str
    sparsity: float
    weights: int
    floor_bytes: int  # that a step of SparseOpt must touch
    copy_gb_per_s: float
    times: Mapping[str, Summary]  # by contestant


def table(comparisons: Sequence[Comparison]) -> str:
    """For each network, the medians by sparsity, and how many times slower than SparseOpt the others are."""
    lines = [f"One step, median milliseconds on {machine()}; in brackets: how many times SparseOpt is faster"]
    for network in dict.fromkeys(c.network for c in comparisons):
        own = [c for c in comparisons if c.network == network]
        rivals = [name for name in own[0].times if name != OURS]
        header = ("sparsity", "SparseOpt", *rivals, "bytes/weight", "GB/s", "copy GB/s")
        lines += ["", f"{network}, {own[0].weights} weights"]
        lines += aligned([header, *(_row(c, rivals) for c in own)])
    lines += ["", "bytes/weight: the least that a step of SparseOpt can touch. GB/s: these bytes per median."]
    return "\n".join(lines)


def _row(comparison: Comparison, rivals: Sequence[str]) -> tuple[str, ...]:
    median = comparison.times[OURS].p50_ms
    theirs = [comparison.times[name].p50_ms for name in rivals]
    return (
        str(comparison.sparsity),
        f"{median:.3f}",
        *(f"{ms:.3f} [{ms / median:.2f}]" for ms in theirs),
        f"{comparison.floor_bytes / comparison.weights:.2f}",
        f"{comparison.floor_bytes / median / 1e6:.1f}",
        f"{comparison.copy_gb_per_s:.1f}",
    )


def append_csv(comparisons: Sequence[Comparison], path: Path) -> None:
    """Add a row for each contestant; a new file begins with ``COLUMNS``."""
    path.parent.mkdir(exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(COLUMNS)
        for c in comparisons:
            for name, times in c.times.items():
                writer.writerow(
                    [
                        *(date.today(), __version__, torch.__version__, machine(), THREADS, _isa()),
                        *(c.network, c.weights, c.sparsity, c.floor_bytes, f"{c.copy_gb_per_s:.2f}", name),
                        *(f"{ms:.4f}" for ms in (times.p20_ms, times.p50_ms, times.p80_ms)),
                        times.rounds,
                    ]
                )


def _isa() -> str:
    return os.environ.get("SPARSEOPT_CPU_ISA") or "".join(build_info().get("isas", ())[:1])
