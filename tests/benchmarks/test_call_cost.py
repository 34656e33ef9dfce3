"""What the call of a step costs: that each backend is in the table. No times are looked at."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import call_cost
import pytest
import torch

from sparseopt_kernels import kernels, native_library
from sparseopt_kernels import optimizer as optimizer_module
from sparseopt_kernels.lab.timing import Rounds
from sparseopt_kernels.step import change_detection

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


def test_the_ways_of_a_step_are_in_the_table(rows: list[str]) -> None:
    if native_library.MISSING:
        pytest.skip(native_library.MISSING)
    ways = ("made again natively", "observed natively", "observed in Python")
    assert {f"SparseOpt cpu, {size}{way}" for size in ("", "one tensor, ") for way in ways} <= set(rows)


@pytest.mark.skipif(bool(native_library.MISSING), reason="the native library was not built")
@pytest.mark.parametrize("way", range(3))
def test_each_way_is_gone(way: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what a step of each calls: the same natively, natively and then the plan, or Python alone."""
    step = [*call_cost._cpu_turns().values()][2 * way].step
    for _ in range(3):
        step()
    called: list[str] = []

    def noted(module: ModuleType, name: str) -> None:
        function = getattr(module, name)

        def noting(*arguments: Any) -> Any:
            called.append(name)
            return function(*arguments)

        monkeypatch.setattr(module, name, noting)

    noted(optimizer_module, "observe")
    noted(change_detection, "read_gradients")
    step()
    assert called == ["observe", "read_gradients"][:way]


def test_sgd_is_in_the_table(rows: list[str]) -> None:
    assert {"SGD fused", "SGD fused, gradients move"} <= set(rows)


@pytest.mark.parametrize("name", MISSING)
def test_a_backend_is_in_the_table(rows: list[str], name: str) -> None:
    if MISSING[name] is not None:
        pytest.skip(f"backend {name!r} has no calls to measure: {MISSING[name]}")
    assert f"SparseOpt {name}" in rows
    assert f"SparseOpt {name}, gradients move" in rows
    assert f"SparseOpt {name}, masks new" in rows
