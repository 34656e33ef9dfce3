"""Estimates the time of a step on an H100 by a queueing model of a multiprocessor; nothing is measured.

    python benchmarks/gpu_model.py

No GPU is needed: the kernels of Triton, and those of CUDA if there is nvcc, are compiled for one, and
registers and instructions are counted in their machine code. Only ratios of 1.5 and more mean anything.

Assumptions:

- An H100 has 132 multiprocessors at 1.755 GHz, each with its share of 3.35 TB/s, of which 93% are reached.
- A load takes 650 ns from memory, 200 from the L2 cache, 20 from the L1 cache. Parameters, momentum,
  gradients, masks and lists come from memory, because the forward and backward passes have filled the caches.
  The table of tensors and c_i come from the L2 cache, because many programs read them, and so does every
  second owner of a chunk.
- Memory delivers single sectors. If it delivers pairs, more bytes move; ``traffic`` says how many.
- Stores take bandwidth like loads, but nothing waits for them.
- A multiprocessor issues four instructions a cycle, 85% of the time; a warp that waits for its own results
  issues one in 2.6 cycles. In Triton's kernels all instructions of a loop count, whether or not their branch
  is taken; in CUDA's, those of the shortest way around the loop on which the update is made. The CUDA kernel
  reads the table three times from the L1 cache, and waits for it once.
- A multiprocessor holds as many programs as its registers allow, at most 32; a program (in CUDA a warp) takes
  60 ns to start. All start at once, and nothing else runs. The host's time to launch is not counted.
- Masks are random with ERK's densities, and have the expected number of live sectors.

``floor`` is the least possible memory traffic (see ``networks.floor_bytes``) at 3.35 TB/s. ``triton`` and
``cuda`` are steps with unchanged masks. ``masks new`` is a step of Triton in which all masks are new, without
the kernels that make lists of them. The last table is for the share of sectors that are listed at most,
``lists.LISTED``.
"""

from __future__ import annotations

import heapq
import math
import sys
import tempfile
from collections.abc import Generator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from cuda_code import NVCC, compile_file
from machine_code import Instruction, instructions, usage
from machine_paths import Code, loops, outermost, shortest_round
from networks import RESNET20, RESNET50
from torch.nn.parameter import Parameter
from triton_code import compiled_by

import sparseopt_kernels as sk
from sparseopt_kernels.kernels.gpu.lists import LISTED, weights_per_sector
from sparseopt_kernels.kernels.gpu.triton import PROGRAMS, REGISTERS, TritonKernels
from sparseopt_kernels.lab.bench.network import Shape
from sparseopt_kernels.text_table import aligned

CLOCK = 1.755  # GHz
MULTIPROCESSORS = 132
PEAK = 3350.0  # bytes per ns
BANDWIDTH = 0.93 * PEAK / MULTIPROCESSORS
DRAM, L2, L1 = 650.0, 200.0, 20.0  # ns
ISSUED = 4 * CLOCK * 0.85  # instructions of all warps per ns
ALONE = 2.6 / CLOCK  # ns per instruction of one warp
START = 60.0  # ns
WARP = 32
DTYPES = (torch.float32, torch.bfloat16)
CUDA_TYPES = {torch.float32: "float", torch.bfloat16: "BFloat16", torch.float16: "Half"}
SPARSITIES = (0.0, 0.9, 0.95, 0.99)
_LIVE_SHARES = (0.2, 0.3, 0.4, 0.5, 0.8)
NETWORKS: dict[str, list[Shape]] = {"ResNet-20": RESNET20, "ResNet-50": RESNET50, "4096x4096": [(4096, 4096)]}


class Phases(NamedTuple):
    """The registers and instruction counts of a kernel that visits memory in a loop."""

    registers: int
    before: int  # before the loop, once per program
    loads: int  # in the loop, up to the load of the first weight
    update: int  # in the loop, from there to the store of the last weight

    def programs(self) -> int:
        """Return the number of programs that a multiprocessor holds at a time."""
        return min(PROGRAMS, REGISTERS // (-(-self.registers // 8) * 8 * WARP))


class Kernels(NamedTuple):
    sector_step: Phases
    masked: Phases
    counting: int  # instructions of a round of the loop in which masked_step counts fan-in


class Layer(NamedTuple):
    """A parameter of a network, with its density; a dense one has density 1 and no mask."""

    rows: int
    columns: int
    density: float
    masked: bool

    @property
    def weights(self) -> int:
        return self.rows * self.columns


def layers_of(shapes: Sequence[Shape], sparsity: float) -> list[Layer]:
    weights = {str(i): shape for i, shape in enumerate(shapes) if len(shape) > 1}
    densities: Mapping[str, float] = {}
    if sparsity > 0:
        densities = sk.layer_densities(weights, sparsity)
    found = []
    for i, shape in enumerate(shapes):
        masked = len(shape) > 1
        rows = shape[0] if masked else 1
        found.append(Layer(rows, math.prod(shape) // rows, densities.get(str(i), 1.0), masked))
    return found


def live_share(density: float, weights: int) -> float:
    """Return the expected fraction of pieces of ``weights`` weights that hold an active one."""
    return 1 - (1 - density) ** weights


def floor_ns(layers: Sequence[Layer], lanes: int) -> float:
    size = 32 // lanes
    total = 0.0
    for layer in layers:
        total += (
            5 * size * layer.weights * live_share(layer.density, lanes) + layer.masked * layer.weights / 8
        )
    return total / PEAK


# It yields the time at which it can continue, and is sent that time when it is its turn.
Program = Generator[float, float, None]


class Multiprocessor:
    """A multiprocessor with two queues: the times at which it has issued and moved all that was requested."""

    def __init__(self) -> None:
        self._issued = self._moved = 0.0

    def compute(self, now: float, instructions: float) -> float:
        self._issued = max(self._issued, now) + instructions / ISSUED
        return max(now + instructions * ALONE, self._issued)

    def move(self, now: float, nbytes: float, latency: float = 0.0) -> float:
        self._moved = max(self._moved, now) + nbytes / BANDWIDTH
        return max(now, self._moved) + latency

    def run(self, programs: Sequence[Program], at_a_time: int) -> float:
        """Run programs and return the time at which all have ended. They are resumed in the order of the
        times that they yield, so that shared resources are given to the earliest."""
        queue: list[tuple[float, int]] = []
        waiting, end = iter(range(len(programs))), 0.0

        def start(now: float) -> None:
            number = next(waiting, None)
            if number is not None:
                next(programs[number])
                heapq.heappush(queue, (now + START, number))

        for _ in range(at_a_time):
            start(0.0)
        while queue:
            now, number = heapq.heappop(queue)
            try:
                heapq.heappush(queue, (programs[number].send(now), number))
            except StopIteration:
                end = max(end, now)
                start(now)
        return max(end, self._moved)


def sector_ns(
    layers: Sequence[Layer], lanes: int, phases: Phases, on: Multiprocessor, most_listed: float = LISTED
) -> float:
    """Return the time of a step with unchanged masks: it visits all sectors of dense layers and of
    those where more than ``most_listed`` are live, and the listed sectors of the others."""
    chunk, size = TritonKernels.chunk, 32
    chunks: list[tuple[float, float]] = []  # for each: the bytes of lists or masks, and the live sectors
    for layer in layers:
        sectors, share = -(-layer.weights // lanes), live_share(layer.density, lanes)
        listed = layer.masked and share <= most_listed
        visited = round(sectors * share) if listed else sectors
        mask_bytes = lanes / 8 * layer.masked + 4 * listed
        for first in range(0, visited, chunk):
            here = min(chunk, visited - first)
            chunks.append((here * mask_bytes, here if listed else here * share))
    programs = min(len(chunks), phases.programs() * MULTIPROCESSORS)

    def program(first: int) -> Program:
        own = [*chunks[first::programs], (0.0, 0.0)]
        now = yield 0.0
        now = yield on.compute(now, phases.before / 2) + (DRAM + L2) / 2  # the first chunk's owner
        now = yield on.compute(now, phases.before / 2) + L2  # the table
        now = yield on.move(now, own[0][0] + 4, DRAM if own[0][0] else 0.0)
        for (_, live), (next_bytes, _) in pairwise(own):
            now = yield on.compute(now, phases.loads) + L1  # the table's row, which was read before
            arrived = on.move(now, 3 * size * live, DRAM)  # c_i arrives earlier
            # Meanwhile the next chunk's owner, its row of the table, and its list are loaded in turn.
            waited = (DRAM + L2) / 2 + L2 + (DRAM if next_bytes else 0.0)
            listed = on.move(now, next_bytes + 4, waited)
            now = yield max(arrived, listed)
            now = yield on.compute(now, phases.update)
            now = yield on.move(now, 2 * size * live)

    return on.run([program(i) for i in range(0, programs, MULTIPROCESSORS)], phases.programs())


def masked_ns(layers: Sequence[Layer], lanes: int, kernels: Kernels, on: Multiprocessor) -> float:
    """Return the time of a step with new masks, each of which is read, counted by neuron, and read again."""
    phases, tiles = kernels.masked, TritonKernels()
    programs: list[Program] = []

    def program(layer: Layer, rows: int) -> Program:
        counted, tile = tiles.counted, tiles.units * lanes
        now = yield 0.0
        now = yield on.compute(now, phases.before) + (DRAM + L2) / 2 + L2  # owner, then the table
        for first in range(0, layer.columns, counted):
            now = yield on.move(now, rows * min(counted, layer.columns - first), DRAM)
            now = yield on.compute(now, kernels.counting)
        now = yield now + L2  # the mean fan-in
        for first in range(0, layer.columns, tile):
            here = rows * math.ceil(min(tile, layer.columns - first) / lanes)
            live = here * live_share(layer.density, lanes)
            now = yield on.compute(now, phases.loads)
            # Meanwhile the next part of the mask is loaded for the second time.
            now = yield on.move(now, 3 * 32 * live, DRAM)
            now = yield on.compute(now, phases.update)
            now = yield on.move(now, 2 * 32 * live)

    for layer in layers:
        if layer.masked:
            for first in range(0, layer.rows, tiles.rows):
                programs.append(program(layer, min(tiles.rows, layer.rows - first)))
    return on.run(programs[::MULTIPROCESSORS], phases.programs())


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
        kernel = compile_file("sector_step", 90, Path(folder))["sector_step", CUDA_TYPES[dtype]]
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


def step_us(
    shapes: Sequence[Shape], sparsity: float, sector_step: Phases, dtype: torch.dtype = torch.float32
) -> float:
    """Return the time of a step with unchanged masks, in microseconds."""
    layers = layers_of(shapes, sparsity)
    return sector_ns(layers, weights_per_sector(dtype), sector_step, Multiprocessor()) / 1e3


def list_ratio(share: float, sector_step: Phases) -> float:
    """Return the time of a float32 layer whose live sectors are listed, divided by that of a visit to all.

    Args:
        share: of the sectors that are live.
        sector_step: of a backend.
    """
    layer = Layer(4096, 4096, 1 - (1 - share) ** (1 / 8), masked=True)
    listed, all_sectors = (sector_ns([layer], 8, sector_step, Multiprocessor(), most) for most in (1.0, 0.0))
    return listed / all_sectors


def main() -> int:
    header = ("network", "sparsity", "floor", "triton", "/ floor", "cuda", "/ floor", "masks new")
    rows: list[tuple[str, ...]] = [header]
    single: dict[str, Phases] = {}
    for dtype in DTYPES:
        kernels, lanes = triton_kernels(dtype), weights_per_sector(dtype)
        of_cuda = cuda_sector_step(dtype)
        if dtype == torch.float32:
            single = {"triton": kernels.sector_step, **({} if of_cuda is None else {"cuda": of_cuda})}
        print(f"{dtype}: {kernels}; sector_step of CUDA: {of_cuda or 'no nvcc'}")
        for name, shapes in NETWORKS.items():
            for sparsity in SPARSITIES:
                layers = layers_of(shapes, sparsity)
                floor = floor_ns(layers, lanes) / 1e3
                times = [f"{floor:.1f}"]
                for sector_step in (kernels.sector_step, of_cuda):
                    us = math.nan if sector_step is None else step_us(shapes, sparsity, sector_step, dtype)
                    times += [f"{us:.1f}", f"{us / floor:.2f}"]
                new = masked_ns(layers, lanes, kernels, Multiprocessor()) / 1e3
                network = f"{name}, {str(dtype).removeprefix('torch.')}"
                rows.append((network, str(sparsity), *times, f"{new:.1f}"))
    print("An estimate, in microseconds on an H100, of what its assumptions imply: nothing was measured.")
    print("\n".join(aligned(rows)))
    print("\nThe time with a list of live sectors, divided by that of a visit to all (4096x4096, float32)")
    shares = [
        (f"{s:g} live", *(f"{list_ratio(s, own):.2f}" for own in single.values())) for s in _LIVE_SHARES
    ]
    print("\n".join(aligned([("", *single), *shares])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
