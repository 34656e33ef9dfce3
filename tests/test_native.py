"""The native library alone: its types, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparseopt_kernels.kernels import cpu

REASON = native.CPU.unavailable(torch.device("cpu"))
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"backend 'cpu': {REASON}")


RULE: dict[str, Any] = {
    **dict.fromkeys(("lr", "momentum", "dampening", "weight_decay", "ham_alpha", "ham_beta", "gamma"), 0.0),
    **{"nesterov": False, "maximize": False, "correction": "layer"},
}


def test_unknown_names_are_refused() -> None:
    from sparseopt_kernels import _native

    with pytest.raises(ValueError, match="dtype is 'int8', it must be"):
        _native.Tensor(
            dtype="int8", parameter=0, momentum_buffer=0, numel=0, ham=False, mask=None, watch=None
        )
    with pytest.raises(ValueError, match="correction is 'erk', it must be"):
        _native.Rule(**{**RULE, "correction": "erk"})


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
