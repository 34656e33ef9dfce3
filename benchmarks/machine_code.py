"""Reads the machine code of NVIDIA's GPUs (SASS, in a cubin). No GPU is needed."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from cuda_tools import tool

_FUNCTION = re.compile(r"^\s+Function : (\S+)$", re.M)
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+) )?\s*([A-Z][\w.]*)([^;]*);", re.M)
_USAGE = re.compile(r"^ Function (\S+?):\n(.*)$", re.M)
# Arithmetic and conversions; MUFU.RCP64H and similar ones begin a division or a root.
_FLOAT64 = re.compile(r"D(ADD|MUL|FMA|SETP|SET|MNMX|MMA)\b|.*\bF64\b|.*64H\b")


def cuobjdump() -> str | None:
    """Return the path of the disassembler, from the CUDA toolkit or Triton's wheel; None if there is none."""
    triton = importlib.util.find_spec("triton")
    wheel = Path(triton.origin).parent / "backends/nvidia/bin" if triton and triton.origin else Path()
    return tool("cuobjdump") or shutil.which("cuobjdump", path=str(wheel))


def usage(cubin: Path) -> dict[str, dict[str, int]]:
    """Return the resources of each function of a cubin: REG(isters), STACK, LOCAL, SHARED and others."""
    listing = _run("--dump-resource-usage", cubin)
    return {
        function: {kind: int(number) for kind, number in re.findall(r"(\w+)(?:\[\d+\])?:(\d+)", line)}
        for function, line in _USAGE.findall(listing)
    }


class Instruction(NamedTuple):
    address: int
    predicate: str  # empty if the instruction is always executed
    opcode: str  # without operands: LDG.E.128
    operands: str

    def jumps_to(self) -> int | None:
        """Return the target address of a branch; None for other instructions."""
        found = re.search(r"0x([0-9a-f]+)", self.operands) if self.opcode.startswith("BRA") else None
        return None if found is None else int(found[1], 16)


def instructions(cubin: Path) -> dict[str, list[Instruction]]:
    """Return the instructions of each function of a cubin, in order."""
    pieces = _FUNCTION.split(_run("-sass", cubin))[1:]
    return {
        function: [Instruction(int(at, 16), *rest) for at, *rest in _INSTRUCTION.findall(listing)]
        for function, listing in zip(pieces[::2], pieces[1::2], strict=True)
    }


def opcodes(cubin: Path) -> dict[str, list[str]]:
    """Return the opcodes of each function of a cubin, in order."""
    return {function: [i.opcode for i in code] for function, code in instructions(cubin).items()}


def accesses(code: Iterable[str], opcode: str) -> Counter[int]:
    """Count the loads (LDG) or stores (STG) of global memory, by bits per thread."""
    sizes = (re.search(r"\.[US]?(8|16|64|128|256)\b", o) for o in code if o.split(".")[0] == opcode)
    return Counter(int(size[1]) if size else 32 for size in sizes)


def float64(code: Iterable[str]) -> set[str]:
    """Return the double-precision opcodes, for which most GPUs have hardly any units."""
    return {opcode for opcode in code if _FLOAT64.match(opcode)}


def _run(option: str, cubin: Path) -> str:
    tool = cuobjdump()
    assert tool is not None
    return subprocess.run([tool, option, str(cubin)], check=True, capture_output=True, text=True).stdout
