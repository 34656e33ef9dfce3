"""The Triton backend on a CPU: its kernels, compiled for an H100, are executed as PTX.

All of Triton's stack is used, its launcher included; only the driver is a stand-in. The parameters that
reach a kernel are compared with what the backend gave.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import stand_in_driver
from triton.compiler import CompiledKernel

from ptx.launches import Launch, hand_over
from ptx.machine import Machine
from ptx.program import Program, programs_of
from sparseopt_kernels.kernels.gpu import triton as backend
from sparseopt_kernels.kernels.memory import address_of


class TritonExecuted:
    """Executes what the Triton backend launches, and counts launches by their kernels."""

    def __init__(self, machine: Machine, cache: Path) -> None:
        self._machine, self._cache = machine, cache  # the folder in which Triton keeps what it compiles
        self._loaded: dict[Any, Any] = {}
        self._programs: dict[int, Program] = {}  # by the driver's handles
        self._given: list[bytes] | None = None  # what the launch under way was given
        self.launches: Counter[str] = Counter()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Let the Triton backend execute its kernels, on CPU tensors."""
        self.launches.clear()
        init_handles, launch = CompiledKernel._init_handles, backend._launch

        def load(kernel: Any) -> None:
            init_handles(kernel)
            (self._programs[kernel.function],) = programs_of(kernel.asm["ptx"]).values()

        def noted_launch(
            kernel: Any,
            programs: int,
            memory: Sequence[Any],
            constants: dict[str, Any],
            rules: tuple[backend.RuleArgument, ...] | None = None,
            share_out: bool = False,
        ) -> None:
            addresses = [int(address_of(tensor)).to_bytes(8, "little") for tensor in memory]
            numbers = [np.float32(number).tobytes() for rule in rules or () for number in rule]
            self._given = addresses + numbers
            launch(kernel, programs, memory, constants, rules, share_out)
            assert self._given is None, f"{kernel.__name__} was not launched"

        with (
            stand_in_driver.active(self._cache) as library,
            hand_over(library, "stand_in", self._on_launch),
            patch.object(CompiledKernel, "_init_handles", load),
            patch.object(backend, "_launch", noted_launch),
            patch.object(backend, "LOADED", self._loaded),
            patch.object(backend.TRITON, "unavailable", lambda device: None),
        ):
            yield

    def _on_launch(self, launch: Launch) -> None:
        program = self._programs[launch.function]
        given, values = self._given, launch.values(program)
        assert given is not None, f"{program.name} is launched twice"
        assert values[: len(given)] == given, (program.name, values, given)
        assert not any(map(any, values[len(given) :])), "memory for scratch, which was not asked for"
        assert (launch.threads, launch.stream) == (32, stand_in_driver.STREAM)
        self._given = None
        launch.execute(self._machine, program)
        self.launches[program.name] += 1
