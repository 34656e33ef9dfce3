"""Mistakes in the CUDA kernels, made on purpose, which are seen when compiled kernels are executed.

One build has all of them, and makes one when it is told to. A build for each of them would take a minute.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from cuda_on_cpu.build import Substitution

from ptx.build import build_ptx
from ptx.cuda_executed import Kernels, kernels_in

NUMBERS = "other numbers"


class Mistake(NamedTuple):
    change: Substitution  # where `new` has {wrong}, it is true if the mistake is made
    found: str  # what is said of it: an error of the machine, or NUMBERS
    dtype: torch.dtype = torch.float32  # of the weights


_BFLOAT16 = 'asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(reg) : "f"(values[1]), "f"(values[0]));'
_FLOAT16 = 'asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(reg) : "f"(values[1]), "f"(values[0]));'
_SWAPPED = '"f"({wrong} ? values[0] : values[1]), "f"({wrong} ? values[1] : values[0]));'


def _swapped(text: str) -> str:
    return text.replace('"f"(values[1]), "f"(values[0]));', _SWAPPED)


MISTAKES = {
    "bfloat16 pairs in the wrong order": Mistake(
        Substitution("cuda/stored.h", _BFLOAT16, _swapped(_BFLOAT16)), NUMBERS, torch.bfloat16
    ),
    "float16 pairs in the wrong order": Mistake(
        Substitution("cuda/stored.h", _FLOAT16, _swapped(_FLOAT16)), NUMBERS, torch.float16
    ),
    "float16 read as bfloat16": Mistake(
        Substitution(
            "cuda/stored.h",
            '"=f"(value) : "h"(raw(reg, i)));',
            '"=f"(value) : "h"(raw(reg, i)));\n    if ({wrong}) value = load(BFloat16{raw(reg, i)});',
        ),
        NUMBERS,
        torch.float16,
    ),
    "no barrier before the sums of warps, in a row": Mistake(
        Substitution(
            "cuda/masked_step.cu",
            "__syncthreads();\n  value = 0;",
            "if (!{wrong}) __syncthreads();\n  value = 0;",
        ),
        "read of what another lane wrote",
    ),
    "no barrier before the sums of warps, in the norm": Mistake(
        Substitution("cuda/sector_squares.cu", "  __syncthreads();\n", "  if (!{wrong}) __syncthreads();\n"),
        "write of what another lane read",
    ),
    "a part of the warp sums up a row": Mistake(
        Substitution(
            "cuda/masked_step.cu",
            "  unsigned active = mask.bits(thread);\n",
            "  if ({wrong} && !inside) return;\n  unsigned active = mask.bits(thread);\n",
        ),
        "its mask is not that of the lanes that are there",
    ),
    "a part of the warp sums up the norm": Mistake(
        Substitution(
            "cuda/sector_squares.cu",
            "kWarp / 2; offset > 0",
            "kWarp / (2 + 2 * {wrong}); offset > 0",
        ),
        NUMBERS,
    ),
    "all blocks write one sum": Mistake(
        Substitution(
            "cuda/sector_squares.cu",
            "argument.sums[2 * int64_t(blockIdx.x)] = sum.high",
            "argument.sums[2 * int64_t(blockIdx.x) * !{wrong}] = sum.high",
        ),
        "write of what another lane wrote",
    ),
    "weights read as constants": Mistake(
        Substitution(
            "cuda/fragment.h",
            "raw[i] = __ldcs(reinterpret_cast<const uint4*>(from) + i)",
            "raw[i] = {wrong} ? __ldg(reinterpret_cast<const uint4*>(from) + i)"
            " : __ldcs(reinterpret_cast<const uint4*>(from) + i)",
        ),
        "constant",
    ),
    "the mask behind its end": Mistake(
        Substitution("cuda/mask_bits.h", "count >= kWeights &&", "(count >= kWeights || {wrong}) &&"),
        "an address outside of live memory",
    ),
    "the mask from where it is not aligned": Mistake(
        Substitution(
            "cuda/mask_bits.h",
            "reinterpret_cast<uintptr_t>(mask) % sizeof(Access) == 0",
            "({wrong} || reinterpret_cast<uintptr_t>(mask) % sizeof(Access) == 0)",
        ),
        "a misaligned address",
    ),
    "vectors from where they are not aligned": Mistake(
        Substitution(
            "cuda/fragment.h",
            "% sizeof(uint4) == 0",
            "% ({wrong} ? sizeof(uint16_t) : sizeof(uint4)) == 0",
        ),
        "a misaligned address",
    ),
    "the owner of a chunk behind the last": Mistake(
        Substitution(
            "cuda/sector_loop.h",
            "if (chunk >= *argument.chunks) return",
            "if (!{wrong} && chunk >= *argument.chunks) return",
        ),
        "an address outside of live memory",
    ),
    "weights written behind the tensor": Mistake(
        Substitution(
            "cuda/fragment.h",
            "if (i < count) __stcs(at + i, raw(i));",
            "if (i < count || {wrong}) __stcs(at + i, raw(i));",
        ),
        "an address outside of live memory",
    ),
    "two sectors in a place of the list": Mistake(
        Substitution("cuda/lists.cu", "place += __popc(is_live);", "place += {wrong} ? 0 : __popc(is_live);"),
        "write of what another lane wrote",
    ),
    "two warps count a row": Mistake(
        Substitution(
            "cuda/lists.cu",
            "* kWarps + threadIdx.x / kWarp;",
            "* kWarps + threadIdx.x / (kWarp << {wrong});",
        ),
        "write of what another lane wrote",
    ),
    "the scale of AMP left out": Mistake(
        Substitution(
            "cuda/tensor_rule.h",
            "if (inputs.grad_scale != nullptr)",
            "if (!{wrong} && inputs.grad_scale != nullptr)",
        ),
        NUMBERS,
    ),
    "HAM of biases": Mistake(
        Substitution("cuda/tensor_rule.h", "rule.ham && wants_ham", "rule.ham && (wants_ham || {wrong})"),
        NUMBERS,
    ),
    "a step in spite of an overflow": Mistake(
        Substitution(
            "cuda/sector_step.cu", "if (found_inf != nullptr &&", "if (!{wrong} && found_inf != nullptr &&"
        ),
        NUMBERS,
    ),
    "c_i rounded to bfloat16": Mistake(
        Substitution(
            "cuda/sector_loop.h",
            "    c_ = __ldg(at_);\n",
            "    c_ = __ldg(at_);\n"
            "    if ({wrong}) c_ = T(load(BFloat16{uint16_t(__float_as_uint(float(c_)) >> 16)}));\n",
        ),
        NUMBERS,
    ),
}


def kernels_with_mistakes(directory: Path) -> Kernels:
    """The kernels of a build that has all mistakes, and makes that whose number is ``gridDim.y``."""
    changes = [mistake.change for mistake in MISTAKES.values()]
    return kernels_in(
        build_ptx(
            directory,
            [
                Substitution(path, old, new.replace("{wrong}", f"(gridDim.y == {number})"))
                for number, (path, old, new) in enumerate(changes, FIRST)
            ],
        )
    )


FIRST = 2
"""The number of the first of them; 1 is none."""


def number_of(name: str) -> int:
    return FIRST + [*MISTAKES].index(name)
