"""Reads what the model of a GPU's step (``gpu_model``) takes from compiled kernels: registers, and counts of
instructions. Kernels are compiled for an H100; none runs."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from cuda_code import NVCC, compile_file
from machine_code import Instruction, instructions, usage
from machine_paths import Code, loops, outermost, shortest_round
from torch.nn.parameter import Parameter
from triton_code import compiled_by

import sparseopt_kernels as sk
from sparseopt_kernels.kernels.gpu.lists import weights_per_sector
from sparseopt_kernels.kernels.gpu.triton import PROGRAMS, REGISTERS

_WARP = 32
_CUDA_TYPES = {torch.float32: "float", torch.bfloat16: "BFloat16", torch.float16: "Half"}


class Phases(NamedTuple):
    """The registers and instruction counts of a kernel that visits memory in a loop."""

    registers: int
    before: int  # before the loop, once per program
    loads: int  # in the loop, up to the load of the first weight
    update: int  # in the loop, from there to the store of the last weight

    def programs(self) -> int:
        """Return the number of programs that a multiprocessor holds at a time."""
        return min(PROGRAMS, REGISTERS // (-(-self.registers // 8) * 8 * _WARP))


class Kernels(NamedTuple):
    sector_step: Phases
    masked: Phases
    counting: int  # instructions of a round of the loop in which masked_step counts fan-in


def triton_kernels(dtype: torch.dtype = torch.float32) -> Kernels:
    """Return the kernels that a training run launches on an H100: momentum, weight decay, one group."""

    def steps() -> None:
        p = Parameter(torch.zeros(8, 64, dtype=dtype))
        p.grad = torch.zeros_like(p)
        masks = {p: torch.ones(p.shape, dtype=torch.bool)}
        numbers = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
        optimizer = sk.SparseOpt([p], masks=masks, backend="triton", **numbers)  # type: ignore[arg-type]
        optimizer.step()
        optimizer.step()

    code = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, _, kernel in compiled_by(steps):
            cubin = Path(folder, name)
            cubin.write_bytes(kernel.asm["cubin"])
            (listing,), (taken,) = instructions(cubin).values(), usage(cubin).values()
            code[name] = listing, taken["REG"]
    masked, registers = code["masked_step"]
    return Kernels(_triton_phases(*code["sector_step"]), _triton_phases(masked, registers), _count(masked))


def cuda_sector_step(dtype: torch.dtype = torch.float32) -> Phases | None:
    """Return the instruction counts of the CUDA backend's ``sector_step``; None if there is no nvcc."""
    if NVCC is None:
        return None
    before, way, registers = cuda_round(dtype)
    return _phases(way, registers, before)


def cuda_round(dtype: torch.dtype) -> tuple[int, list[Instruction], int]:
    """Read the CUDA backend's ``sector_step``.

    Returns:
        The number of instructions before its loop, the instructions of a round of the loop, and the
        registers.

    The kernel has all variants of the rule. The round is the shortest way on which a momentum step is made,
    with weights that have a c_i, and the next sector is found.
    """
    with tempfile.TemporaryDirectory() as folder:
        kernel = compile_file("sector_step", 90, Path(folder))["sector_step", _CUDA_TYPES[dtype]]
    begin = max((own for own in loops(kernel.code) if any(map(_is_vector, own))), key=len)[0].address
    way = shortest_round(
        kernel.code,
        begin,
        {
            lambda i: _is_vector(i) and i.opcode.startswith("LDG"): 6,
            lambda i: _is_vector(i) and i.opcode.startswith("STG"): 4,
            lambda i: i.opcode.startswith("LDG") and i.opcode.endswith(".CONSTANT"): 4,  # c_i, list, and bits
            lambda i: i.opcode.startswith("I2F"): 1,  # the division that finds a sector's row, in 32 bits
            # With weight decay, there are three for each weight, which excludes rules with fewer.
            lambda i: i.opcode.startswith("FFMA"): 3 * weights_per_sector(dtype),
        },
    )
    return sum(instruction.address < begin for instruction in kernel.code), way, kernel.usage["REG"]


def _triton_phases(code: Code, registers: int) -> Phases:
    loop = min((own for own in loops(code) if any(map(_is_vector, own))), key=len)
    return _phases(loop, registers, before=len(code) - sum(map(len, outermost(loops(code)))))


def _phases(round_: Code, registers: int, before: int) -> Phases:
    """Count the instructions of a round of the loop over memory."""
    vectors = [i for i, instruction in enumerate(round_) if _is_vector(instruction)]
    return Phases(registers, before, vectors[0], vectors[-1] + 1 - vectors[0])


def _count(code: Code) -> int:
    return sum(len(own) for own in outermost(loops(code)) if not any(map(_is_vector, own)))


def _is_vector(instruction: Instruction) -> bool:
    return instruction.opcode.startswith(("LDG", "STG")) and instruction.opcode.endswith(".128")
