"""The native library alone: its types, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from sparseopt_kernels import native_library
from sparseopt_kernels.kernels import cpu

REASON = cpu.CPU.unavailable(torch.device("cpu"))
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"backend 'cpu': {REASON}")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="dtype is 'int8', it must be"):
        native_library.Tensor(
            dtype="int8",
            parameter=0,
            momentum_buffer=0,
            numel=0,
            ham=False,
            mask=None,
            factors=0,
            watch=None,
        )


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparseopt_kernels.optimizer import SparseOpt

    monkeypatch.setenv("SPARSEOPT_CPU_ISA", "sse9")
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="SPARSEOPT_CPU_ISA is 'sse9', this processor can run"):
        SparseOpt([p], backend="cpu").step()
    assert p.tolist() == [1.0] * 3


def test_build_info_says_what_is_there() -> None:
    info = cpu.build_info()
    assert info["native"] is True
    assert info["isas"][-1] == "plain"
