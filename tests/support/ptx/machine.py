"""Executes compiled kernels on a CPU: PTX, all lanes of a launch, on the very memory of this process.

These are errors, which name the instruction and a thread:

- an address outside of the memory of all tensors that Python knows, or outside of shared memory;
- an address that is no multiple of the size of the access, vectors as a whole;
- shfl, vote, redux, ldmatrix or a barrier that not all lanes of its mask, or threads of its block, reach;
- a loop without an end.

Races are accesses of one byte by two lanes, of which one is a write, and which nothing orders. In shared
memory barriers order; in memory of the device nothing does within a launch. What ld.global.nc reads and the
launch writes is among them.

Not checked are: what ptxas makes of the PTX (SASS, registers, spills); the error of ex2.approx, which is
exact here; the orders that the memory model allows and this machine does not take; an address that leaves its
tensor and hits another one; streams, graphs, time. Not known are atomics, textures, local memory,
asynchronous copies, barriers of a part of a block, generic addresses of other memory than that of the device,
and grids and blocks of more than one dimension.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import ref

import torch
from built_once import load

from ptx.build import build_machine
from ptx.program import Program

_TENSORS = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
_MANY = 20_000  # objects, through which it takes a millisecond to look


class Machine:
    """Executes launches."""

    def __init__(self, directory: Path) -> None:
        self._machine: ModuleType = load(build_machine(directory))
        self._decoded: dict[int, tuple[Program, Any]] = {}
        self._old_tensors: list[ref[torch.Tensor]] = []
        gc.unfreeze()  # tensors that the collector was told to leave alone are looked for, too
        self.Illegal: type[Exception] = self._machine.Illegal

    def _live_memory(self) -> list[tuple[int, int]]:
        """The addresses and sizes of the memory of all tensors of the CPU that Python knows."""
        objects = gc.get_objects()
        # Not those of classes of their own, such as lazy parameters, which may have no memory.
        tensors = [found for found in objects if type(found) in _TENSORS]
        tensors += [tensor for known in self._old_tensors if (tensor := known()) is not None]
        blocks = []
        for tensor in tensors:
            if tensor.device.type == "cpu" and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                blocks.append((storage.data_ptr(), storage.nbytes()))
        if len(objects) > _MANY:  # modules that were imported, say: they are not looked through again
            del objects
            self._old_tensors = [*map(ref, tensors)]
            gc.collect()
            gc.freeze()
        return [(address, nbytes) for address, nbytes in blocks if address and nbytes]

    def run(
        self,
        program: Program,
        parameters: bytes,
        *,
        blocks: int,
        threads: int,
        shared_nbytes: int = 0,
        memory: list[tuple[int, int]] | None = None,
        mistake: int = 1,
    ) -> Mapping[str, int]:
        """Execute a launch, and return its races by what they are: of how many bytes.

        Args:
            parameters: as they lie in the memory of parameters.
            shared_nbytes: those of shared memory that the launch asks for.
            memory: addresses and sizes of what the kernel may touch; None: all live tensors.
            mistake: what the kernel is told that the second dimension of the grid is: see ``mistakes.py``.

        Raises:
            Illegal: a GPU would refuse it, or do it in no defined way.
        """
        if id(program) not in self._decoded:
            self._decoded[id(program)] = (
                program,
                self._machine.Program(program.instructions, program.registers),
            )
        races: dict[str, int] = self._decoded[id(program)][1].execute(
            parameters,
            blocks,
            mistake,
            threads,
            program.shared_nbytes + shared_nbytes,
            self._live_memory() if memory is None else memory,
        )
        return races
