"""The native CPU backend, with each instruction set that this processor has."""

from __future__ import annotations

import pytest
import torch
from backends import ISA_VARIABLE, NATIVE_ISAS

from sparseopt_kernels.kernels import cpu


@pytest.fixture(params=NATIVE_ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    reason = cpu.CPU.unavailable(torch.device("cpu"))
    if reason is not None:
        pytest.skip(f"backend 'cpu': {reason}")
    if request.param not in cpu.available_isas():
        pytest.skip(f"this CPU has no {request.param}")
    monkeypatch.setenv(ISA_VARIABLE, request.param)
    return request.param
