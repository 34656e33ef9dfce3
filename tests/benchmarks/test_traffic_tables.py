"""The table of memory traffic in the docs agrees with benchmarks/results/traffic.csv."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPARSITIES = ("0.0", "0.8", "0.9", "0.95", "0.97", "0.99")
DOCS_COLUMNS = ("ResNet-20", "ResNet-50", "ResNet-50, bfloat16", "4096x4096")


def metered(network: str, sparsity: str, cost: str) -> str:
    """Bytes per weight."""
    with (ROOT / "benchmarks/results/traffic.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if (row["network"], row["sparsity"], row["columns"]) == (network, sparsity, "all"):
                return f"{float(row[cost]) / int(row['weights']):.2f}"
    raise AssertionError(f"there is no row of {network} at {sparsity}")


def cells(page: str, first: str) -> list[str]:
    """Those of a table's row, after its first."""
    for line in (ROOT / page).read_text().splitlines():
        own = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and own[0] == first and len(own) > 5:
            return own[1:]
    raise AssertionError(f"{page} has no row of {first!r}")


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_the_table_of_the_docs(sparsity: str) -> None:
    found = cells("docs/performance.md", f"sparsity {sparsity.removesuffix('.0')}")
    expected = [
        f"{metered(network, sparsity, 'sectors_bytes')} / {metered(network, sparsity, 'pairs_bytes')}"
        for network in DOCS_COLUMNS
    ]
    assert found == [*expected, metered("ResNet-50", sparsity, "floor_bytes")]
