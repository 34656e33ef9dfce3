"""Estimates the time of a step on an H100 by a queueing model of a multiprocessor; nothing is measured.

    python benchmarks/gpu_model.py

No GPU is needed: the kernels of Triton, and those of CUDA if there is nvcc, are compiled for one
(``kernel_phases``), and registers and instructions are counted in their machine code.

How fast the memory is, is not known, and it decides: so each figure is a range, between two assumptions.
Times are far from sure. Their ratios to the time of SGD, under the same assumption, are what to quote. Where
0.90 and 0.70 come from, and what a simulator of cycles says, is in docs/performance.md.

- "sectors": memory delivers single sectors of 32 bytes, at 0.90 of its peak.
- "pairs": it delivers aligned pairs of sectors, 64 bytes, at 0.70 of its peak. How many more bytes that are
  depends on the pattern: here, on the expected share of pairs with an active weight.

Other assumptions:

- An H100 has 132 multiprocessors at 1.755 GHz, each with its share of 3.35 TB/s.
- A load takes 650 ns from memory, 200 from the L2 cache, 20 from the L1 cache. Parameters, momentum,
  gradients, masks and lists come from memory, because the forward and backward passes have filled the caches.
  The table of tensors and c_i come from the L2 cache, because many programs read them, and so does every
  second owner of a chunk.
- Masks and lists are read in order, so that pairs of their sectors cost nothing more.
- Stores take bandwidth like loads, but nothing waits for them.
- A multiprocessor issues four instructions a cycle, 85% of the time; a warp that waits for its own results
  issues one in 2.6 cycles. In Triton's kernels all instructions of a loop count, whether or not their branch
  is taken; in CUDA's, those of the shortest way around the loop on which the update is made. The CUDA kernel
  reads the table three times from the L1 cache, and waits for it once.
- A multiprocessor holds as many programs as its registers allow, at most 32; a program (in CUDA a warp) takes
  60 ns to start. All start at once, and nothing else runs. The host's time to launch is not counted.
- Masks are random with ERK's densities, and have the expected number of live sectors.

``SGD`` is PyTorch's dense fused SGD with momentum: 20 bytes per weight, 10 in half precision. Its time is
that of its bytes, the start of a program and one read from memory; PyTorch's takes several launches, and so
more. ``floor`` is the time of the least traffic of a step, without any wait. ``triton`` and ``cuda`` are
steps with unchanged masks. ``masks new`` is a step of Triton in which all masks are new, without the kernels
that make lists of them. ``x SGD`` is the time of SGD divided by that of the step before it. The last table is
for the share of sectors that are listed at most, ``lists.LISTED``.
"""

from __future__ import annotations

import heapq
import math
import sys
from collections.abc import Generator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from kernel_phases import Kernels, Phases, cuda_sector_step, triton_kernels
from networks import RESNET20, RESNET50

import sparseopt_kernels as sk
from sparseopt_kernels.kernels.gpu.lists import LISTED, weights_per_sector
from sparseopt_kernels.kernels.gpu.triton import TritonKernels
from sparseopt_kernels.lab.bench.network import Shape
from sparseopt_kernels.text_table import aligned

CLOCK = 1.755  # GHz
MULTIPROCESSORS = 132
PEAK = 3350.0  # bytes per ns
DRAM, L2, L1 = 650.0, 200.0, 20.0  # ns
ISSUED = 4 * CLOCK * 0.85  # instructions of all warps per ns
ALONE = 2.6 / CLOCK  # ns per instruction of one warp
START = 60.0  # ns
DTYPES = (torch.float32, torch.bfloat16)
SPARSITIES = (0.0, 0.9, 0.95, 0.99)
_LIVE_SHARES = (0.2, 0.3, 0.4, 0.5, 0.8)
SGD_ACCESSES = 5  # of each weight: p and b read and written, g read
NETWORKS: dict[str, list[Shape]] = {"ResNet-20": RESNET20, "ResNet-50": RESNET50, "4096x4096": [(4096, 4096)]}


class Memory(NamedTuple):
    """What is assumed of the memory."""

    efficiency: float  # the share of its peak bandwidth that is reached
    sectors: int  # that are delivered together

    @property
    def bandwidth(self) -> float:
        """Of all multiprocessors, in bytes per ns."""
        return self.efficiency * PEAK

    def pieces(self, density: float, lanes: int) -> float:
        """Return the bytes that are moved of random weights, as a share of all their bytes.

        Args:
            density: of the mask.
            lanes: the weights of a sector.
        """
        return live_share(density, lanes * self.sectors)


MEMORIES = {"sectors": Memory(efficiency=0.90, sectors=1), "pairs": Memory(efficiency=0.70, sectors=2)}


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


def floor_ns(layers: Sequence[Layer], lanes: int, memory: Memory) -> float:
    """Return the time of the least traffic of a step: that of live weights, and the mask's bits."""
    size = 32 // lanes
    total = 0.0
    for layer in layers:
        moved = layer.weights * memory.pieces(layer.density, lanes)
        total += SGD_ACCESSES * size * moved + layer.masked * layer.weights / 8
    return total / memory.bandwidth


def sgd_ns(layers: Sequence[Layer], lanes: int, memory: Memory) -> float:
    """Return the least time of a dense fused SGD with momentum."""
    size = 32 // lanes
    weights = sum(layer.weights for layer in layers)
    return START + DRAM + SGD_ACCESSES * size * weights / memory.bandwidth


# It yields the time at which it can continue, and is sent that time when it is its turn.
Program = Generator[float, float, None]


class Multiprocessor:
    """A multiprocessor with two queues: the times at which it has issued and moved all that was requested."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self._bandwidth = memory.bandwidth / MULTIPROCESSORS
        self._issued = self._moved = 0.0

    def compute(self, now: float, instructions: float) -> float:
        self._issued = max(self._issued, now) + instructions / ISSUED
        return max(now + instructions * ALONE, self._issued)

    def move(self, now: float, nbytes: float, latency: float = 0.0) -> float:
        self._moved = max(self._moved, now) + nbytes / self._bandwidth
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


class Chunk(NamedTuple):
    """The memory of what a program visits at a time."""

    list_bytes: float  # of the list or of the mask's bits
    moved: float  # bytes of each tensor of weights that memory delivers


def chunks_of(
    layers: Sequence[Layer], lanes: int, memory: Memory, most_listed: float = LISTED
) -> list[Chunk]:
    """Return the chunks of a step with unchanged masks: it visits all sectors of dense layers and of
    those where more than ``most_listed`` are live, and the listed sectors of the others."""
    chunks = []
    for layer in layers:
        sectors, share = -(-layer.weights // lanes), live_share(layer.density, lanes)
        listed = layer.masked and share <= most_listed
        visited = round(sectors * share) if listed else sectors
        mask_bytes = lanes / 8 * layer.masked + 4 * listed
        moved = 32 * memory.pieces(layer.density, lanes) / (share if listed else 1.0)
        for first in range(0, visited, TritonKernels.chunk):
            here = min(TritonKernels.chunk, visited - first)
            chunks.append(Chunk(list_bytes=here * mask_bytes, moved=here * moved))
    return chunks


def sector_ns(
    layers: Sequence[Layer], lanes: int, phases: Phases, on: Multiprocessor, most_listed: float = LISTED
) -> float:
    """Return the time of a step with unchanged masks."""
    chunks = chunks_of(layers, lanes, on.memory, most_listed)
    programs = min(len(chunks), phases.programs() * MULTIPROCESSORS)

    def program(first: int) -> Program:
        own = [*chunks[first::programs], Chunk(list_bytes=0.0, moved=0.0)]
        now = yield 0.0
        now = yield on.compute(now, phases.before / 2) + (DRAM + L2) / 2  # the first chunk's owner
        now = yield on.compute(now, phases.before / 2) + L2  # the table
        now = yield on.move(now, own[0].list_bytes + 4, DRAM if own[0].list_bytes else 0.0)
        for (_, moved), (next_bytes, _) in pairwise(own):
            now = yield on.compute(now, phases.loads) + L1  # the table's row, which was read before
            arrived = on.move(now, 3 * moved, DRAM)  # c_i arrives earlier
            # Meanwhile the next chunk's owner, its row of the table, and its list are loaded in turn.
            waited = (DRAM + L2) / 2 + L2 + (DRAM if next_bytes else 0.0)
            listed = on.move(now, next_bytes + 4, waited)
            now = yield max(arrived, listed)
            now = yield on.compute(now, phases.update)
            now = yield on.move(now, 2 * moved)

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
            moved = 32 * here * on.memory.pieces(layer.density, lanes)
            now = yield on.compute(now, phases.loads)
            # Meanwhile the next part of the mask is loaded for the second time.
            now = yield on.move(now, 3 * moved, DRAM)
            now = yield on.compute(now, phases.update)
            now = yield on.move(now, 2 * moved)

    for layer in layers:
        if layer.masked:
            for first in range(0, layer.rows, tiles.rows):
                programs.append(program(layer, min(tiles.rows, layer.rows - first)))
    return on.run(programs[::MULTIPROCESSORS], phases.programs())


def step_us(
    shapes: Sequence[Shape],
    sparsity: float,
    memory: Memory,
    sector_step: Phases,
    dtype: torch.dtype = torch.float32,
) -> float:
    """Return the time of a step with unchanged masks, in microseconds."""
    layers = layers_of(shapes, sparsity)
    return sector_ns(layers, weights_per_sector(dtype), sector_step, Multiprocessor(memory)) / 1e3


def sgd_us(shapes: Sequence[Shape], memory: Memory, dtype: torch.dtype = torch.float32) -> float:
    """Return the time of SGD without masks, in microseconds."""
    return sgd_ns(layers_of(shapes, 0.0), weights_per_sector(dtype), memory) / 1e3


def list_ratio(share: float, sector_step: Phases, memory: Memory) -> float:
    """Return the time of a float32 layer whose live sectors are listed, divided by that of a visit to all.

    Args:
        share: of the sectors that are live.
        sector_step: of a backend.
        memory: what is assumed of it.
    """
    layer = Layer(4096, 4096, 1 - (1 - share) ** (1 / 8), masked=True)
    listed, all_sectors = (
        sector_ns([layer], 8, sector_step, Multiprocessor(memory), most) for most in (1.0, 0.0)
    )
    return listed / all_sectors


def two_digits(figures: Sequence[float]) -> str:
    """Return the range of the figures, with two significant digits: ``53-100``."""
    rounded = [float(f"{figure:.2g}") for figure in (min(figures), max(figures))]
    low, high = (f"{figure:.0f}" if figure >= 10 else f"{figure:#.2g}" for figure in rounded)
    return low if low == high else f"{low}-{high}"


def cells(layers: Sequence[Layer], lanes: int, kernels: Kernels, cuda: Phases | None) -> list[str]:
    """Return the ranges of a row: SGD, the floor, and of each kind of step its time, and the multiple of this
    that SGD takes."""
    by_memory = []
    for memory in MEMORIES.values():
        steps = [kernels.sector_step] if cuda is None else [kernels.sector_step, cuda]
        times = [sector_ns(layers, lanes, own, Multiprocessor(memory)) for own in steps]
        times.append(masked_ns(layers, lanes, kernels, Multiprocessor(memory)))
        sgd = sgd_ns(layers, lanes, memory)
        ratios = [figure for ns in times for figure in (ns / 1e3, sgd / ns)]
        by_memory.append([sgd / 1e3, floor_ns(layers, lanes, memory) / 1e3, *ratios])
    return [two_digits(figures) for figures in zip(*by_memory, strict=True)]


def main() -> int:
    single: dict[str, Phases] = {}
    rows: list[list[str]] = []
    for dtype in DTYPES:
        kernels, lanes, cuda = triton_kernels(dtype), weights_per_sector(dtype), cuda_sector_step(dtype)
        print(f"{dtype}: {kernels}; sector_step of CUDA: {cuda or 'no nvcc'}")
        if dtype == torch.float32:
            single = {"triton": kernels.sector_step, **({} if cuda is None else {"cuda": cuda})}
        for name, shapes in NETWORKS.items():
            for sparsity in SPARSITIES:
                network = f"{name}, {str(dtype).removeprefix('torch.')}"
                rows.append(
                    [network, str(sparsity), *cells(layers_of(shapes, sparsity), lanes, kernels, cuda)]
                )
    header = ["network", "sparsity", "SGD", "floor"]
    for column in (*single, "masks new"):
        header += [column, "x SGD"]
    sectors, pairs = (MEMORIES[name].efficiency for name in ("sectors", "pairs"))
    print("An estimate, in microseconds on an H100, of what its assumptions imply: nothing was measured.")
    print(f"Ranges: memory delivers single sectors at {sectors:.2f} of its peak, or pairs at {pairs:.2f}.")
    print("\n".join(aligned([header, *rows])))
    print("\nThe time with a list of live sectors, divided by that of a visit to all (4096x4096, float32)")
    columns = [(f"{own}, {name}", single[own], memory) for own in single for name, memory in MEMORIES.items()]
    shares = [
        (f"{s:g} live", *(f"{list_ratio(s, phases, memory):.2f}" for _, phases, memory in columns))
        for s in _LIVE_SHARES
    ]
    print("\n".join(aligned([("", *(name for name, *_ in columns)), *shares])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
