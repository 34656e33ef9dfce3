"""Mistakes in the CUDA sources, made on purpose: one build of ``_cuda`` has all, and makes one when asked to.

A build for each of them would take minutes.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

from cuda_on_cpu.build import Substitution, build

# Where `new` has {wrong}, there is 1 if the mistake is made, else 0.
MISTAKES = {
    # Lists of sectors.
    "the number of a listed sector": Substitution(
        "cuda/lists.cu", "static_cast<int32_t>(sector);", "static_cast<int32_t>(sector + {wrong});"
    ),
    "a place in the list": Substitution(
        "cuda/lists.cu", "((1u << lane) - 1));", "(((1u + {wrong}) << lane) - 1));"
    ),
    "the list of another row": Substitution("cuda/lists.cu", "] - before", "] - before * !{wrong}"),
    "a list too short": Substitution(
        "cuda/lists.cu", "position < tensor.capacity)", "position < tensor.capacity - {wrong})"
    ),
    "stale bits behind the tensor": Substitution(
        "cuda/lists.cu",
        "there < kWeights ? static_cast<int>(there) : kWeights",
        "there < kWeights && !{wrong} ? static_cast<int>(there) : kWeights",
    ),
    "bits of the next row": Substitution(
        "cuda/lists.cu",
        "of_row < kWeights ? bits & ((1u << of_row) - 1) : bits",
        "of_row < kWeights && !{wrong} ? bits & ((1u << of_row) - 1) : bits",
    ),
    "weights before the first sector": Substitution(
        "cuda/lists.cu", "early < own.first * kWeights &&", "early + {wrong} < own.first * kWeights &&"
    ),
    "the fan-in of a row": Substitution(
        "cuda/lists.cu",
        "argument.fan_in[own.number()] = active",
        "argument.fan_in[own.number()] = {wrong} ? live : active",
    ),
    "bytes that are true": Substitution(
        "cuda/mask_bits.h",
        "(((bytes & 0x7f7f7f7fu) + 0x7f7f7f7fu) | bytes)",
        "({wrong} ? bytes << 7 : ((bytes & 0x7f7f7f7fu) + 0x7f7f7f7fu) | bytes)",
    ),
    # Steps over sectors.
    "c_i of the next row": Substitution(
        "cuda/sector_loop.h", "(tensor.factors) + row;", "(tensor.factors) + row + {wrong};"
    ),
    "c_i of no row": Substitution(
        "cuda/sector_loop.h",
        "if (tensor.factors == 0) return;",
        "if (tensor.factors == 0 || {wrong}) return;",
    ),
    "c_i of the row before": Substitution(
        "cuda/sector_loop.h", "      c_ = next_;\n", "      if (!{wrong}) c_ = next_;\n"
    ),
    "c_i of a third row": Substitution(
        "cuda/sector_loop.h", "__ldg(at_ + 1);\n    }", "__ldg(at_ + !{wrong});\n    }"
    ),
    "where a row ends": Substitution(
        "cuda/sector_loop.h", "own_ = (1u << left) - 1", "own_ = (1u << (left - {wrong})) - 1"
    ),
    "a row that is found with 32 bits": Substitution(
        "cuda/sector_loop.h", "if (wide) {", "if (wide && !{wrong}) {"
    ),
    "stride": Substitution(
        "cuda/sector_loop.h", "chunk += gridDim.x * kWarps", "chunk += gridDim.x * kWarps + {wrong}"
    ),
    "length": Substitution("cuda/sector_loop.h", "if (i >= row.length)", "if (i + {wrong} >= row.length)"),
    "a sector that is cut to 32 bits": Substitution(
        "cuda/sector_step.cu",
        "int64_t(sector.number) * kWeights",
        "({wrong} ? int32_t(sector.number * kWeights) : int64_t(sector.number) * kWeights)",
    ),
    "a sector that is cut to 32 bits without a sign": Substitution(
        "cuda/sector_step.cu",
        "int64_t(sector.number) * kWeights",
        "({wrong} ? int64_t(sector.number * kWeights) : int64_t(sector.number) * kWeights)",
    ),
    "a sector of gradients that is cut to 32 bits": Substitution(
        "cuda/sector_squares.cu",
        "int64_t(sector.number) * kWeights",
        "({wrong} ? int32_t(sector.number * kWeights) : int64_t(sector.number) * kWeights)",
    ),
    "weights beyond the tensor": Substitution(
        "cuda/sector_step.cu", "count = left < kWeights ?", "count = left < ({wrong} ? 1 : kWeights) ?"
    ),
    "unaligned": Substitution(
        "cuda/fragment.h", "% sizeof(uint4) == 0", "% ({wrong} ? sizeof(float) : sizeof(uint4)) == 0"
    ),
    "unaligned gradients": Substitution(
        "cuda/sector_step.cu", " && is_aligned(from_g)", " && ({wrong} || is_aligned(from_g))"
    ),
    # One pass over neurons.
    "c_i of one pass": Substitution(
        "cuda/masked_step.cu",
        "correction_factor(fan_in, __ldg(",
        "correction_factor(fan_in, {wrong} ? T(1) : __ldg(",
    ),
    "c_i of one pass where there is none": Substitution(
        "cuda/masked_step.cu",
        "if (tensor.divisor == 0) return T(1);",
        "if (tensor.divisor == 0) return T(1 + {wrong});",
    ),
    "a neuron that is cut to 32 bits": Substitution(
        "cuda/masked_step.cu",
        "begin = row * columns;",
        "begin = {wrong} ? int32_t(row * columns) : row * columns;",
    ),
    "weights beyond the row": Substitution(
        "cuda/masked_step.cu",
        "left < kVectorSize ? static_cast<int>(left)",
        "left < ({wrong} ? 1 : kVectorSize) ? static_cast<int>({wrong} ? 1 : left)",
    ),
    "a weight less in the tail": Substitution(
        "cuda/masked_step.cu",
        "? static_cast<int>(",
        "? -{wrong} + static_cast<int>(",
    ),
    "no barrier": Substitution(
        "cuda/masked_step.cu",
        "__syncthreads();\n  value = 0;",
        "if (!{wrong}) __syncthreads();\n  value = 0;",
    ),
    "unaligned gradients of new masks": Substitution(
        "cuda/masked_step.cu", " && is_aligned(g_)", " && ({wrong} || is_aligned(g_))"
    ),
    "another row": Substitution(
        "cuda/masked_step.cu",
        "first_row + (threadIdx.x >> log2)",
        "first_row + {wrong} + (threadIdx.x >> log2)",
    ),
    # What is asked of the runtime.
    "the default stream": Substitution(
        "cuda/check.h",
        "reinterpret_cast<cudaStream_t>(stream)",
        "reinterpret_cast<cudaStream_t>({wrong} ? 0 : stream)",
    ),
    "lists on the default stream": Substitution(
        "python/cuda_module.cpp",
        "list_sectors(listing, ends, stream);",
        "list_sectors(listing, ends, {wrong} ? 0 : stream);",
    ),
    "a norm on the default stream": Substitution(
        "python/cuda_module.cpp",
        "sector_squares(launch, addresses, sums, stream);",
        "sector_squares(launch, addresses, sums, {wrong} ? 0 : stream);",
    ),
    "an error that stays": Substitution(
        "cuda/check.h", "  cudaGetLastError();", "  if (!{wrong}) cudaGetLastError();"
    ),
    "a launch of nothing": Substitution(
        "cuda/check.h", "if (blocks == 0) return;", "if (blocks == 0 && !{wrong}) return;"
    ),
    "no version of the driver": Substitution(
        "cuda/driver.cu",
        "check(cudaDriverGetVersion(&version),",
        "check({wrong} ? (cudaDriverGetVersion(&version), cudaSuccess) : cudaDriverGetVersion(&version),",
    ),
    "a step of a block for each eight chunks": Substitution(
        "cuda/sector_step.cu",
        "sector_blocks(of.dtype, of.most_chunks, of.multiprocessors)",
        "sector_blocks(of.dtype, of.most_chunks, {wrong} ? 1 << 20 : of.multiprocessors)",
    ),
    "a norm of a block for each eight chunks": Substitution(
        "cuda/sector_squares.cu",
        "sector_blocks(of.dtype, of.most_chunks, of.multiprocessors)",
        "sector_blocks(of.dtype, of.most_chunks, {wrong} ? 1 << 20 : of.multiprocessors)",
    ),
    # Arguments.
    "dampening that was rounded": Substitution(
        "cuda/argument.h",
        "T(1.0 - rule.dampening)",
        "({wrong} ? T(1) - T(rule.dampening) : T(1.0 - rule.dampening))",
    ),
    # The norm.
    "the error of a square": Substitution(
        "cuda/sector_squares.cu",
        "add(square, multiply_add(value, value, -square))",
        "add(square, {wrong} ? T(0) : multiply_add(value, value, -square))",
    ),
    "the error of a square in two roundings": Substitution(
        "cuda/sector_squares.cu",
        "multiply_add(value, value, -square)",
        "({wrong} ? value * value - square : multiply_add(value, value, -square))",
    ),
    "the error of a sum": Substitution(
        "cuda/sector_squares.cu",
        "((high - (sum - added)) + (value - added))",
        "({wrong} ? T(0) : (high - (sum - added)) + (value - added))",
    ),
    "errors of other lanes": Substitution(
        "cuda/sector_squares.cu", "sum.add(high, low);", "sum.add(high, {wrong} ? T(0) : low);"
    ),
    "errors of other warps": Substitution(
        "cuda/sector_squares.cu", "of_warp[i].low);", "{wrong} ? T(0) : of_warp[i].low);"
    ),
    "errors that are not written": Substitution(
        "cuda/sector_squares.cu", "sum.high - sum.high == T(0) ?", "sum.high - sum.high == T(0) && !{wrong} ?"
    ),
}


def build_with_mistakes(directory: Path) -> Path:
    """Return the path of the compiled module, in ``directory``, where it is kept from run to run."""
    chosen = [f"(cuda_on_cpu_mistake == {number})" for number in range(1, len(MISTAKES) + 1)]
    return build(
        directory,
        [
            Substitution(path, old, new.replace("{wrong}", wrong))
            for (path, old, new), wrong in zip(MISTAKES.values(), chosen, strict=True)
        ],
        declarations='extern "C" int cuda_on_cpu_mistake;',
    )


def make_mistake(library: Path, name: str | None) -> None:
    """Let the library at ``library`` make this mistake from now on; None: none."""
    number = 0 if name is None else 1 + [*MISTAKES].index(name)
    ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "cuda_on_cpu_mistake").value = number
