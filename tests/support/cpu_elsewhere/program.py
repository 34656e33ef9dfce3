"""The CPU loops without Python: built for another processor or under a sanitizer, and fed with cases."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from oracle import Hyper
from rules import EVERYTHING, FLOATS, NESTEROV
from side_by_side import pattern_mask
from torch import Tensor

from sparseopt_kernels.correction import Correction, mask_factors
from sparseopt_kernels.neurons import Neurons

ROOT = Path(__file__).parents[3]
SOURCES = [
    *(
        ROOT / "csrc" / "cpu" / name
        for name in ("packed_mask.cpp", "step.cpp", "strategy.cpp", "write_watch.cpp")
    ),
    Path(__file__).with_name("steps_of_a_file.cpp"),
]
LOOPS = ROOT / "csrc" / "cpu" / "loops.cpp"
FLAGS = [
    "-std=c++17",
    "-O2",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-fopenmp",
]
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # as in csrc/names.h


def build(
    compiler: str, program: Path, loops: Sequence[tuple[str, str, Sequence[str]]], flags: Sequence[str]
) -> None:
    """Compile the program. An instruction set that is left out is the first of the others, by another name.

    Args:
        loops: instruction sets: the name, the table and the compiler's options of each.
        flags: of all sources.
    """
    objects = []
    left_out = {"kPlainLoops", "kAvx2Loops", "kAvx512Loops"} - {table for _, table, _ in loops}
    aliases = [f"-Wl,--defsym={_symbol(table)}={_symbol(loops[0][1])}" for table in sorted(left_out)]
    for isa, table, options in loops:
        compiled = program.with_suffix(f".{isa}.o")
        defines = [f'-DSPARSEOPT_ISA="{isa}"', f"-DSPARSEOPT_LOOPS={table}"]
        _compile([compiler, *FLAGS, *flags, *options, *defines, "-c", str(LOOPS), "-o", str(compiled)])
        objects.append(str(compiled))
    _compile([compiler, *FLAGS, *flags, *map(str, SOURCES), *objects, *aliases, "-o", str(program)])


def _symbol(table: str) -> str:
    return f"_ZN9sparseopt3cpu{len(table)}{table}E"


def _compile(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@dataclass(frozen=True)
class Case:
    """Steps of one tensor; ``grid`` is (groups, segments, neurons per group, length)."""

    grid: tuple[int, int, int, int]
    dtype: torch.dtype
    pattern: str | None
    rule: Hyper
    threads: int = 1
    steps: int = 3

    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None, list[Tensor]]:
        """Parameter, momentum buffer, mask and gradients, always the same."""
        generator = torch.Generator().manual_seed(0)
        parameter = torch.randn(self.grid, generator=generator).to(self.dtype)
        mask = None
        if self.pattern is not None:
            groups, segments, neurons, length = self.grid
            by_neuron = pattern_mask(self.pattern, (groups * neurons, segments * length), generator)
            mask = by_neuron.view(groups, neurons, segments, length).transpose(1, 2).contiguous()
            parameter.masked_fill_(~mask, 0.0)  # 0.0, where a product may be -0.0
        buffer = torch.zeros_like(parameter) if self.rule.momentum else None
        gradients = [torch.randn(self.grid, generator=generator).to(self.dtype) for _ in range(self.steps)]
        return parameter, buffer, mask, gradients

    def factors(self, mask: Tensor) -> Tensor | None:
        """c_i of each run of the mask: (groups, segments, neurons per group)."""
        if self.rule.correction == "none":
            return None
        neurons = Neurons(dim=1, groups=self.grid[0])
        correction = cast("Correction", self.rule.correction)
        return mask_factors(mask.flatten(0, 1), neurons, correction)

    def encoded(self) -> bytes:
        parameter, buffer, mask, gradients = self.tensors()
        rule, factors = self.rule, None if mask is None else self.factors(mask)
        header = struct.pack(
            "=14q7d",
            *(
                _DTYPES.index(self.dtype),
                parameter.element_size(),
                buffer is not None,
                mask is not None,
                True,
            ),
            *self.grid,
            *(self.steps, self.threads),
            *(rule.nesterov, rule.maximize, factors is not None),
            *(rule.lr, rule.momentum, rule.dampening, rule.weight_decay, rule.ham_alpha, rule.ham_beta, 1.0),
        )
        arrays = [parameter, buffer, mask, factors, *gradients]
        return header + b"".join(_bytes(array) for array in arrays if array is not None)


def cases(large: bool = True) -> list[Case]:
    """Every dtype and kind of rule over shapes with tails, short rows, several runs to a neuron."""
    plain = Hyper(lr=0.1, momentum=0.9, weight_decay=0.01)
    rules = [Hyper(lr=0.1, weight_decay=0.01), plain, NESTEROV, EVERYTHING]
    grids = [(1, 1, 3, 5), (1, 1, 40, 27), (1, 1, 7, 1031), (1, 1, 130, 1), (2, 3, 4, 9), (1, 5, 7, 16)]
    small = [
        Case(grid, dtype, pattern, rule)
        for grid in grids
        for dtype in FLOATS
        for pattern in (None, "half", "sparse99", "empty-rows")
        for rule in rules
    ]
    big = [Case((1, 1, 64, 4099), dtype, "sparse99", plain, threads=3) for dtype in FLOATS]
    return small + big * large


def run(
    command: Sequence[str], cases: Sequence[Case], **environment: str
) -> list[tuple[bytes, bytes, float]]:
    """What a program makes of cases: the bytes of weights and momentum buffers, and the squared norm."""
    result = subprocess.run(
        command, input=b"".join(case.encoded() for case in cases), capture_output=True, env=environment
    )
    assert result.returncode == 0, result.stderr.decode()
    found, at = [], 0
    for case in cases:
        parameter, buffer, _, _ = case.tensors()
        size = parameter.numel() * parameter.element_size()
        sizes = (size, size if buffer is not None else 0, 8)
        parts = [result.stdout[at + sum(sizes[:i]) : at + sum(sizes[: i + 1])] for i in range(3)]
        found.append((parts[0], parts[1], struct.unpack("=d", parts[2])[0]))
        at += sum(sizes)
    assert at == len(result.stdout)
    return found


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
