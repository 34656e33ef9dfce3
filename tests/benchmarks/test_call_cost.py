"""What the call of a step costs: that each backend is in the table. No times are looked at."""

from __future__ import annotations

import call_cost
import pytest
import torch

from sparseopt_kernels import kernels
from sparseopt_kernels.lab.timing import Rounds

MISSING = {
    "triton": kernels.BACKENDS["triton"].unavailable(torch.device("cuda")),
    "cuda": None if kernels.build_info()["cuda"] else "the CUDA kernels were not built",
}


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The names of the rows that a short run prints."""
    monkeypatch.setattr(call_cost, "_ROUNDS", Rounds(timed=2, warmup=1))
    assert call_cost.main() == 0
    _, _, *rows = capsys.readouterr().out.splitlines()
    return [row.rstrip("0123456789 ") for row in rows]


def test_sgd_is_in_the_table(rows: list[str]) -> None:
    assert {"SGD fused", "SGD fused, gradients move"} <= set(rows)


@pytest.mark.parametrize("name", MISSING)
def test_a_backend_is_in_the_table(rows: list[str], name: str) -> None:
    if MISSING[name] is not None:
        pytest.skip(f"backend {name!r} has no calls to measure: {MISSING[name]}")
    assert f"SparseOpt {name}" in rows
    assert f"SparseOpt {name}, gradients move" in rows
    assert f"SparseOpt {name}, masks new" in rows
