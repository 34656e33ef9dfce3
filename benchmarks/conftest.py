"""Collects the benchmarks' results; at the end they are printed, written to files and drawn."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cpu_map_picture
import cpu_step_picture
import pytest
import torch
from comparison import THREADS, Comparison
from cpu_report import table, worst_of_map
from cpu_results import MAP, STEP, instruction_set, own_rows, path_of, picture_of, replace, rows_of

from sparseopt_kernels.lab.atomic import write_atomically
from sparseopt_kernels.lab.machine import machine
from sparseopt_kernels.lab.timing import QUIET, processor_share

RESULTS = Path(__file__).parent / "results"
_FOUND = pytest.StashKey[dict[str, list[Comparison]]]()
_START = pytest.StashKey[float]()
_SHARE = pytest.StashKey[float]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench_*")
    # The warning is about training; here masks are random and nothing is trained.
    config.addinivalue_line("filterwarnings", "ignore:.*fan-in is concentrated:UserWarning")
    nothing: dict[str, list[Comparison]] = {STEP: [], MAP: []}
    config.stash[_FOUND] = nothing
    config.stash[_START] = time.monotonic()
    try:  # fail before anything is measured
        for kind in (STEP, MAP):
            own_rows(path_of(RESULTS, kind, machine()), machine())
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[_SHARE] = processor_share()


@pytest.fixture(scope="session", autouse=True)
def two_threads() -> None:
    torch.set_num_threads(THREADS)


@pytest.fixture
def record_step(pytestconfig: pytest.Config) -> Callable[[Comparison], None]:
    """Return a function that adds a comparison to the tables."""
    return pytestconfig.stash[_FOUND][STEP].append


@pytest.fixture
def record_map(pytestconfig: pytest.Config) -> Callable[[Comparison], None]:
    """Return a function that adds a comparison to the map."""
    return pytestconfig.stash[_FOUND][MAP].append


@pytest.hookimpl(trylast=True)  # below the table of pytest-benchmark
def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    found = config.stash[_FOUND]
    if found[STEP]:
        terminalreporter.write_line(f"\n{table(found[STEP], machine(), instruction_set())}")
    if found[MAP]:
        terminalreporter.write_line(f"\n{worst_of_map(found[MAP])}")
    measured = [kind for kind in found if found[kind]]
    if measured and exitstatus != pytest.ExitCode.OK:
        terminalreporter.write_line("\nnot all benchmarks ran and were right: nothing was written")
    elif measured:
        for path in (path for kind in measured for path in _write(kind, found[kind])):
            shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
            terminalreporter.write_line(f"written: {shown}")
    share = min(config.stash[_SHARE], processor_share())
    if measured and share < QUIET:
        terminalreporter.write_line(
            f"Other programs were running, a thread got {share:.0%} of a processor: these times mean little."
        )
    minutes, seconds = divmod(round(time.monotonic() - config.stash[_START]), 60)
    terminalreporter.write_line(f"{minutes} min {seconds} s in all")


def _write(kind: str, comparisons: list[Comparison]) -> list[Path]:
    """Write the table and the picture of a kind, and return the files written."""
    isa = instruction_set()
    table_path = path_of(RESULTS, kind, machine())
    rows = replace(table_path, rows_of(comparisons, machine()), machine())
    draw = {STEP: cpu_step_picture.png, MAP: cpu_map_picture.png}[kind]
    picture = draw([row for row in rows if row["isa"] == isa])
    if picture is None:
        return [table_path]
    picture_path = picture_of(RESULTS, kind, machine(), isa)
    write_atomically(picture_path, picture)
    return [table_path, picture_path]
