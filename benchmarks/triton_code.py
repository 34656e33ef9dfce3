"""Compiles the Triton kernels of steps for a GPU that need not be here: launches stop after compilation.

The kernels and arguments are those of a training run. ``machine_code`` reads ``asm["cubin"]``.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from sparseopt_kernels.kernels.gpu import triton as backend
from sparseopt_kernels.step import factors

H100 = GPUTarget("cuda", 90, 32)


class Compiled(NamedTuple):
    """A kernel that would have been launched."""

    name: str
    constants: dict[str, Any]
    kernel: Any  # triton.compiler.CompiledKernel


def compiled_by(step: Callable[[], object], target: GPUTarget = H100) -> list[Compiled]:
    """Return all launches that ``step`` makes with the backend "triton", on CPU tensors; no kernel runs."""
    found: list[Compiled] = []
    run = JITFunction.run

    def only_compile(self: Any, *arguments: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        kernel = run(self, *arguments, grid=grid, warmup=True, **constants)
        found.append(Compiled(self.__name__, constants, kernel))

    gpu = SimpleNamespace(
        get_current_device=lambda: target,  # the cache key of compiled kernels
        get_current_stream=lambda device: 0,
        get_current_target=lambda: target,
    )
    with (
        mock.patch("triton.runtime.jit.driver", SimpleNamespace(active=gpu)),
        mock.patch.object(JITFunction, "run", only_compile),
        mock.patch.object(backend.TRITON, "unavailable", return_value=None),
        # Nothing counted, so c_i is whatever the memory held.
        mock.patch.object(factors, "warn_of_concentration"),
    ):
        step()
    return found
