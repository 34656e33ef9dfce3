"""Collects what the benchmarks measure, and reports it when all have run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cpu_report import Comparison, append_csv, table

RESULTS = Path(__file__).parent / "results" / "cpu_step.csv"
_COMPARISONS = pytest.StashKey[list[Comparison]]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench_*")
    config.stash[_COMPARISONS] = []


@pytest.fixture
def record_comparison(pytestconfig: pytest.Config) -> Callable[[Comparison], None]:
    """Makes a comparison part of the report."""
    return pytestconfig.stash[_COMPARISONS].append


@pytest.hookimpl(trylast=True)  # below the table of pytest-benchmark
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    comparisons = config.stash[_COMPARISONS]
    if comparisons:
        append_csv(comparisons, RESULTS)
        where = RESULTS.relative_to(Path.cwd()) if RESULTS.is_relative_to(Path.cwd()) else RESULTS
        terminalreporter.write_line(f"\n{table(comparisons)}\nappended to {where}")
