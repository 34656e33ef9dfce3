"""The backends under test, and how exact each must be."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from cuda_on_cpu.build import compiler
from torch import Tensor

from sparseopt_kernels import kernels
from sparseopt_kernels.kernels.gpu import triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton decides when it is imported whether it compiles or interprets: its tests are a run of their own."""
EXECUTED = os.environ.get("SPARSEOPT_TEST_EXECUTED") == "1"
"""In a run of its own, the GPU backends' compiled kernels are executed on a CPU (see ``ptx/machine.py``)."""
NATIVE_ISAS = ("avx512", "avx2", "plain")
ISA_VARIABLE = "SPARSEOPT_CPU_ISA"


@dataclass(frozen=True)
class Tolerance:
    """How far a result may be from the float64 oracle after one step.

    ``roundings``: units of the last place of the *arithmetic* type (float32 or float64), relative to the
    sum of the absolute values of the terms that were added, so that cancellation is no excuse and no trap.
    ``storage``: half a unit of the last place of the type that p and b are stored in, relative to the
    result; 0 where the two types are the same, for the last rounding is among the ``roundings``.
    """

    arithmetic_eps: float
    roundings: float
    storage: float


# Half a unit of the last place, and a hundredth of it for a value that lies between two numbers.
_HALF_BFLOAT16 = 0.505 * torch.finfo(torch.bfloat16).eps
_HALF_FLOAT16 = 0.505 * torch.finfo(torch.float16).eps
_EPS32 = torch.finfo(torch.float32).eps
_EPS64 = torch.finfo(torch.float64).eps

# c_i, gamma, c_i * gamma, * g; lambda * p, +; mu * b, (1 - tau) * d, +; mu * b, + (Nesterov); eta * u, -:
# thirteen roundings of half a unit each. HAM has three more in its exponent and an exp that is good to two
# units: the oracle scales its terms by the exponent, so the same number serves.
_ROUNDINGS = 8.0

# Of every backend. All do the same operations as plain PyTorch, one after another, or fused multiply-adds,
# which only take roundings away. What a backend leaves to the reference has the reference's.
TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(_EPS64, _ROUNDINGS, 0.0),
    torch.float32: Tolerance(_EPS32, _ROUNDINGS, 0.0),
    # float32 arithmetic, then one rounding: a backend that rounds b before it is used in u fails.
    torch.bfloat16: Tolerance(_EPS32, _ROUNDINGS, _HALF_BFLOAT16),
    torch.float16: Tolerance(_EPS32, _ROUNDINGS, _HALF_FLOAT16),
}
OTHER_TOLERANCES: dict[tuple[str, torch.dtype], Tolerance] = {
    # Triton's interpreter cuts bfloat16 off where a GPU rounds: a whole unit.
    ("triton", torch.bfloat16): Tolerance(_EPS32, _ROUNDINGS, (1 + INTERPRETED) * _HALF_BFLOAT16),
}


def norm_error(gradients: Iterable[Tensor]) -> float:
    """How far the gradient norm may be off, relatively, and with it gamma and every corrected gradient.

    A sum of n squares in float64, in any order: the root of n units (rounding errors that do not conspire).
    The corrected gradients that are squared may have been rounded to the arithmetic type of their own
    parameter: one unit of float32 as soon as there is one that is not float64.
    """
    gradients = list(gradients)
    narrow = any(grad.dtype not in (torch.float64, torch.complex128) for grad in gradients)
    return _EPS64 * sum(grad.numel() for grad in gradients) ** 0.5 + (_EPS32 if narrow else 0.0)


@dataclass(frozen=True)
class Backend:
    """A backend that can run here: what to pass to ``SparseOpt(backend=)``, and the path inside it."""

    name: str
    isa: str | None = None
    device: str = "cpu"

    @property
    def on_device(self) -> bool:
        """Whether what AMP says stays in a tensor. The host does not know then whether a step was skipped,
        and a momentum buffer may be there, of zeros, before the first step that was not."""
        return not kernels.BACKENDS[self.name].host_scalars(torch.device(self.device))

    @property
    def is_slow(self) -> bool:
        """Whether a step takes a tenth of a second: Triton's interpreter."""
        return INTERPRETED

    def tolerance(self, dtype: torch.dtype) -> Tolerance:
        return OTHER_TOLERANCES.get((self.name, dtype), TOLERANCES[dtype])


def why_not(backend: Backend) -> str | None:
    """The reason why a backend, or its instruction set, cannot run on this machine."""
    if backend == Backend("cuda", "emulated"):
        return None if compiler() else "there is no C++ compiler"
    if backend.isa == "executed":
        return why_not_executed(backend.name)
    reason = kernels.BACKENDS[backend.name].unavailable(torch.device("cpu"))
    if reason is None and backend.name == "cpu":
        from sparseopt_kernels.kernels import cpu

        if backend.isa not in cpu.available_isas():
            return f"this CPU has no {backend.isa}"
    return None


def why_not_executed(name: str) -> str | None:
    """The reason why compiled kernels of a GPU backend cannot be executed here."""
    # Not where ranks import this module: they have no benchmarks on their path.
    import stand_in_driver
    from ptx.build import why_no_cuda, why_no_machine

    if name == "cuda":
        return why_no_cuda()
    if torch.cuda.is_available():
        return "there is a GPU, and a stand-in for its driver would be in its place"
    if stand_in_driver.compiler() is None:
        return "there is no C compiler"
    return triton._MISSING or why_no_machine()


def emulate(library: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the backend "cuda" run what was compiled for the CPU, on CPU tensors."""
    from sparseopt_kernels.kernels.gpu import cuda

    monkeypatch.setattr(cuda, "_MISSING", None)
    monkeypatch.setattr(cuda, "_cuda", library, raising=False)
    monkeypatch.setattr(cuda.CUDA, "unavailable", lambda device: None)
