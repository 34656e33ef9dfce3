"""Launches as the stand-ins of NVIDIA's driver and runtime hand them over."""

from __future__ import annotations

import ctypes
from _thread import interrupt_main
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from ptx.machine import Machine
from ptx.program import Program

_UNSIGNED = ctypes.POINTER(ctypes.c_uint)
_ON_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_size_t,
    _UNSIGNED,
    _UNSIGNED,
    ctypes.c_uint,
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p),
)
_LAUNCH_FAILED = 719


class Launch(NamedTuple):
    function: int  # a handle of the driver, or the address of the kernel's name
    blocks: int
    threads: int  # of a block
    shared_nbytes: int
    stream: int
    parameters: Sequence[int]  # the addresses of their values: as many as the kernel has

    def values(self, program: Program) -> list[bytes]:
        """The values of the parameters of the kernel that is launched."""
        return [ctypes.string_at(self.parameters[i], p.nbytes) for i, p in enumerate(program.parameters)]

    def execute(self, machine: Machine, program: Program, mistake: int = 1) -> None:
        """Execute it.

        Raises:
            AssertionError: lanes raced.
        """
        memory = bytearray(program.parameter_nbytes)
        for parameter, value in zip(program.parameters, self.values(program), strict=True):
            memory[parameter.offset : parameter.offset + parameter.nbytes] = value
        races = machine.run(
            program,
            bytes(memory),
            blocks=self.blocks,
            threads=self.threads,
            shared_nbytes=self.shared_nbytes,
            mistake=mistake,
        )
        assert not races, f"races in {program.name}: {races}"


@contextmanager
def hand_over(library: ctypes.CDLL, prefix: str, execute: Callable[[Launch], None]) -> Iterator[None]:
    """Let a stand-in call ``execute`` at each launch. What it raises is an error of the launch.

    Args:
        prefix: of the names of the library's variables.
    """
    error_text = (ctypes.c_char * 4096).in_dll(library, f"{prefix}_error")

    @_ON_LAUNCH
    def on_launch(
        function: int,
        grid: Sequence[int],
        block: Sequence[int],
        shared: int,
        stream: int | None,
        parameters: Sequence[int],
    ) -> int:
        try:
            assert list(grid[1:3]) == [1, 1] == list(block[1:3]), "a grid of more than one dimension"
            execute(
                Launch(
                    function=function,
                    blocks=grid[0],
                    threads=block[0],
                    shared_nbytes=shared,
                    stream=stream or 0,
                    parameters=parameters,
                )
            )
            return 0
        except BaseException as error:  # it cannot pass through C
            if isinstance(error, KeyboardInterrupt):
                interrupt_main()
            error_text.value = f"{type(error).__name__}: {error}".encode()[:4095]
            return _LAUNCH_FAILED

    variable = ctypes.c_void_p.in_dll(library, f"{prefix}_on_launch")
    variable.value = ctypes.cast(on_launch, ctypes.c_void_p).value
    try:
        yield
    finally:
        variable.value = None
