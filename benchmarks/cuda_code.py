"""Compiles the kernels of csrc/cuda by nvcc, with the flags of the build, for a GPU that need not be here.

``machine_code`` reads the result.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cuda_tools import tool
from machine_code import Instruction, instructions, usage

SOURCES = Path(__file__).parent.parent / "csrc"


NVCC = tool("nvcc")


@dataclass(frozen=True)
class Compiled:
    """A kernel: its instructions and its use of registers and memory."""

    code: Sequence[Instruction]
    usage: dict[str, int]

    @property
    def opcodes(self) -> list[str]:
        return [instruction.opcode for instruction in self.code]

    @property
    def local_memory(self) -> int:
        return self.usage["STACK"] + self.usage["LOCAL"]


def compile_file(
    name: str, architecture: int, folder: Path, sources: Path = SOURCES
) -> dict[tuple[str, str], Compiled]:
    """Return the kernels of a file by their names and the type of the weights: ``("sector_step", "Half")``.

    Args:
        name: the file in csrc/cuda, without its suffix.
        architecture: 90 for sm_90.
        folder: the folder for the machine code.
        sources: csrc, or a copy of it.
    """
    assert NVCC is not None, "there is no nvcc"
    cubin = folder / f"{name}.cubin"
    command = [NVCC, "-std=c++17", *flags(), f"-arch=sm_{architecture}", "-cubin", "-o", str(cubin)]
    subprocess.run([*command, sources / "cuda" / f"{name}.cu"], check=True)
    taken = usage(cubin)
    return {
        kernel_and_type(function): Compiled(code, taken[function])
        for function, code in instructions(cubin).items()
    }


def flags() -> list[str]:
    """Return the build's flags for nvcc."""
    found = re.search(r"COMPILE_LANGUAGE:CUDA>:([^>]*)>", (SOURCES / "cuda/module.cmake").read_text())
    assert found is not None
    return found[1].split(";")


def kernel_and_type(function: str) -> tuple[str, str]:
    """Return the kernel and the type of the weights from a mangled name such as
    ``...sector_step_kernelINS_4HalfEfE...``, ``...sector_step_kernelIddE...`` or
    ``...list_sectors_kernelILi4EdE...``."""
    found = re.search(r"([a-z]+_[a-z]+)_kernelI(?:NS_\d+(\w+?)E|Li(\d+)E)?([fd]?)", function)
    assert found is not None, function
    kernel, half, weights, arithmetic = found.groups()
    return kernel.removeprefix("_"), half or weights or {"f": "float", "d": "double"}[arithmetic]
