"""The command ``doctor``: it says what runs, and notices what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from sparseopt_kernels import kernels, native_library
from sparseopt_kernels.__main__ import main
from sparseopt_kernels.correction import Factors
from sparseopt_kernels.kernels.contract import Inputs, ParamState
from sparseopt_kernels.kernels.reference import Reference, ReferencePlan

CPU = torch.device("cpu")


def test_all_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "PyTorch" in out
    assert "reference  cpu   available, results match" in out
    assert "triton     cpu   not available: " in out
    assert "cuda       cpu   not available: " in out


def test_wrong_results(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class WrongPlan(ReferencePlan):
        def step(self, inputs: Inputs) -> None:
            super().step(inputs)
            self._parts[0].param.parameter.view(-1)[0] += 1e-3

    class Wrong(Reference):
        def plan(self, params: Sequence[ParamState], factors: Sequence[Factors | None]) -> WrongPlan:
            return WrongPlan(super().plan(params, factors)._parts)

    monkeypatch.setitem(kernels.BACKENDS, "cpu", Wrong())
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "WRONG RESULTS" in out
    assert "use backend='reference'" in out


def test_a_wrong_choice_of_backend(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSEOPT_BACKEND", "foo")
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "environment: SPARSEOPT_BACKEND=foo" in out
    assert "SPARSEOPT_BACKEND is 'foo', it must be one of" in out


def test_a_backend_that_cannot_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_library, "MISSING", "the native library was not built")
    kernels._say_once.cache_clear()
    assert main(["doctor"]) == 0
    kernels._say_once.cache_clear()
    out, err = capsys.readouterr()
    assert "cpu   not available: the native library was not built: install a C++ compiler" in out
    assert "cpu tensors go to: reference" in out
    assert err.startswith("note: SparseOpt uses its slow reference backend, because backend 'cpu': ")


@pytest.mark.skipif(native_library.MISSING is not None, reason="the native library was not built")
def test_a_backend_that_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEOPT_CPU_ISA", "sse9")
    assert main(["doctor"]) == 1
    assert "FAILED: SPARSEOPT_CPU_ISA is 'sse9'" in capsys.readouterr().out


def test_a_backend_that_does_not_compile(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an error of the compiler's own, which may say nothing."""

    class Broken(Reference):
        def plan(self, params: Sequence[ParamState], factors: Sequence[Factors | None]) -> Any:
            raise AssertionError

    monkeypatch.setitem(kernels.BACKENDS, "cpu", Broken())
    assert main(["doctor"]) == 1
    assert "cpu        cpu   FAILED: AssertionError()" in capsys.readouterr().out


def test_without_the_library_the_reference_runs_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_library, "MISSING", "the native library was not built")
    kernels._say_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="slow reference backend, because backend 'cpu'") as warned:
        assert [kernels.backend_for("auto", CPU) for _ in range(3)] == [kernels.BACKENDS["reference"]] * 3
    assert len(warned) == 1
    kernels._say_once.cache_clear()
