"""The CUDA backend on a CPU: its kernels, as nvcc compiles them, are executed as PTX. Host code and bindings
are its own, over a runtime that hands launches over."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from built_once import load
from cuda_code import kernel_and_type

from ptx.build import build_cuda, build_ptx
from ptx.launches import Launch, hand_over
from ptx.machine import Machine
from ptx.program import Program, programs_of
from sparseopt_kernels.kernels.gpu import cuda as backend

Kernels = dict[tuple[str, str], Program]
"""By their names and the types of their weights."""


class CudaExecuted:
    """Executes what the CUDA backend launches, and counts launches by their kernels."""

    def __init__(self, machine: Machine, directory: Path) -> None:
        self._machine, self._path = machine, build_cuda(directory)
        self._library = load(self._path)
        self._programs = kernels_in(build_ptx(directory))
        self.launches: Counter[str] = Counter()

    @contextmanager
    def active(self, with_mistakes: Kernels | None = None, mistake: int = 1) -> Iterator[None]:
        """Let the CUDA backend execute its kernels, on CPU tensors.

        Args:
            with_mistakes: kernels that take the place of its own.
            mistake: which of their mistakes these make: see ``mistakes.py``.
        """
        self.launches.clear()
        programs = with_mistakes or self._programs

        def on_launch(launch: Launch) -> None:
            key = kernel_and_type(ctypes.string_at(launch.function).decode())
            assert launch.stream == 0, "another stream than the current one"
            launch.execute(self._machine, programs[key], mistake)
            self.launches[key[0]] += 1

        with (
            hand_over(ctypes.CDLL(str(self._path)), "ptx", on_launch),
            patch.object(backend, "_cuda", self._library, create=True),
            patch.object(backend, "_MISSING", None),
            patch.object(backend.CUDA, "unavailable", lambda device: None),
        ):
            yield


def kernels_in(texts: Iterable[str]) -> Kernels:
    """The kernels of PTX files."""
    return {kernel_and_type(name): own for text in texts for name, own in programs_of(text).items()}
