"""After the benchmarks: a table to read, and a CSV that is added to."""

from __future__ import annotations

import csv
import os
import platform
from datetime import date
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from sparseopt_kernels import __version__, build_info

_COLUMNS = (
    *("date", "version", "torch", "machine", "threads", "isa", "network", "weights", "sparsity"),
    *("floor_bytes", "copy_gb_per_s", "contestant", "p20_ms", "p50_ms", "p80_ms", "rounds"),
)
RESULTS = Path(__file__).parent / "results" / "cpu_step.csv"


def pytest_configure(config: Any) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench_*")


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    benches = [b for b in config._benchmarksession.benchmarks if "milliseconds" in b.extra_info]
    if not benches:
        return
    write = terminalreporter.write_line
    write("")
    write(f"one step, median milliseconds on {_machine()}; in brackets: how many times SparseOpt is faster")
    for bench in benches:
        info = bench.extra_info
        times = {name: median(taken) for name, taken in info["milliseconds"].items()}
        own = times["sparseopt"]
        gb_per_s = info["floor_bytes"] / own / 1e6
        write(
            f"{info['network']}, sparsity {info['sparsity']}: SparseOpt {own:.3f}, "
            + ", ".join(f"{n} {t:.3f} [{t / own:.2f}]" for n, t in times.items() if n != "sparseopt")
            + f"; {info['floor_bytes'] / info['weights']:.2f} bytes per weight at least = {gb_per_s:.1f} GB/s"
            + f", copy {info['copy_gb_per_s']:.1f} GB/s"
        )
    _append(benches)
    write(f"appended to {RESULTS.relative_to(Path.cwd()) if RESULTS.is_relative_to(Path.cwd()) else RESULTS}")


def _append(benches: list[Any]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(_COLUMNS)
        for bench in benches:
            info = bench.extra_info
            for name, taken in info["milliseconds"].items():
                p20, p50, p80 = (quantiles(taken, n=10)[i] for i in (1, 4, 7))
                writer.writerow(
                    [
                        *(date.today(), __version__, torch.__version__, _machine(), 2, _isa()),
                        *(info["network"], info["weights"], info["sparsity"], info["floor_bytes"]),
                        *(f"{info['copy_gb_per_s']:.2f}", name),
                        *(f"{p:.4f}" for p in (p20, p50, p80)),
                        len(taken),
                    ]
                )


def _isa() -> str:
    return os.environ.get("SPARSEOPT_CPU_ISA") or "".join(build_info().get("isas", ())[:1])


def _machine() -> str:
    """The processor's name, which only Linux tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        return f"{names[0]}, {len(names)} cores"
    except (OSError, IndexError):
        return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
