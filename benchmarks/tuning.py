"""Times the native library with other tuning constants: ``make tuning``, in forty minutes.

For each constant the library is built as it is and with other values. The builds take turns, each in a
process of its own, on the work that the constant matters for. A ratio over 1 means that the value is slower
than the one in the sources. The build as it is runs in two processes: how far these are apart is noise, and
the ratio is to their mean. The comment beside a constant quotes its rows.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

import torch
from torch.nn.parameter import Parameter

ROOT = Path(__file__).parents[1]


class Constant(NamedTuple):
    """A tuning constant of ``csrc/cpu``, and other values of it."""

    file: str
    name: str
    values: tuple[str, ...]
    works: tuple[str, ...]
    """The work that it may matter for, among ``WORKS``."""

    @property
    def definition(self) -> str:
        """A regular expression that matches up to its value, which is the second group."""
        return rf"(\b{self.name} = )([^,;]+)"


CONSTANTS = [
    Constant("loops.cpp", "kFar", ("16", "64"), ("large 0.97", "large 0.99")),
    Constant("loops.cpp", "kNear", ("3", "12"), ("large 0.97", "large 0.99")),
    Constant("loops.cpp", "kLongRun", ("2 * kBlock", "32 * kBlock"), ("ResNet-20 0.9", "large 0.9")),
    Constant("packed_mask.cpp", "kWorthListing", ("0.6", "0.99"), ("large 0.8", "large 0.9")),
    Constant("packed_mask.cpp", "kPieceBlocks", ("1 << 10", "1 << 14"), ("new masks",)),
    Constant("strategy.cpp", "kClearlyLess", ("0.85", "1.0"), ("large 0.95", "large 0.9")),
    Constant("strategy.cpp", "kSamples", ("2", "8"), ("large 0.97",)),
    Constant("step.cpp", "kLongestChunk", ("1 << 12", "1 << 16"), ("large 0.5", "large 0.97")),
    Constant("step.cpp", "kShortestChunk", ("1 << 6", "1 << 10"), ("ResNet-20 0.9",)),
    Constant("step.cpp", "kChunksOfAStep", ("1 << 2", "1 << 6"), ("ResNet-20 0.9",)),
    Constant("step.cpp", "kWorthAThread", ("1 << 9", "1 << 13"), ("small layers", "ResNet-20 0.9")),
    Constant("step.cpp", "kWorthTiming", ("1", "1 << 10"), ("ResNet-20 0.9",)),
    Constant("zero_outside.cpp", "kPiece", ("1 << 13", "1 << 20"), ("new masks",)),
    Constant("parallel_for.h", "kGrain", ("1 << 13", "1 << 19"), ("RigL update",)),
    Constant("bit_words.h", "kBatch", ("1 << 8", "1 << 12"), ("RigL update",)),
    Constant("drop_and_grow.cpp", "kFewestPerThread", ("1 << 12", "1 << 18"), ("small RigL update",)),
    Constant("ranks.h", "kBins", ("1 << 8", "1 << 16"), ("RigL update",)),
    Constant("selection.cpp", "kFewest", ("1 << 11", "1 << 16"), ("small RigL update",)),
    Constant("selection.cpp", "kSampledOf", ("1 << 6", "1 << 10"), ("RigL update",)),
    Constant("selection.cpp", "kFewestSampled", ("1 << 8", "1 << 12"), ("small RigL update",)),
    Constant("selection.cpp", "kMostSampled", ("1 << 13", "1 << 17"), ("RigL update",)),
    Constant("selection.cpp", "kWordsTried", ("2", "32"), ("RigL update",)),
    Constant("table.h", "kLookedAt", ("48", "1 << 12"), ("many layers",)),
    Constant("write_watch.cpp", "kLongestRun", ("4", "64"), ("ResNet-20 0.9", "large 0.97")),
]


def _step(shapes: Sequence[tuple[int, ...]], sparsity: float) -> Callable[[], None]:
    from sparseopt_kernels import SparseOpt

    torch.manual_seed(0)
    parameters = [Parameter(torch.randn(shape)) for shape in shapes]
    masks = {p: torch.rand(p.shape) >= sparsity for p in parameters}
    for p in parameters:
        p.grad = torch.randn(p.shape)
    optimizer = SparseOpt(parameters, lr=1e-3, momentum=0.9, masks=masks, backend="cpu")
    for _ in range(20):
        optimizer.step()
    return optimizer.step


def _new_masks() -> Callable[[], None]:
    from sparseopt_kernels import SparseOpt

    torch.manual_seed(0)
    p = Parameter(torch.randn(4096, 2048))
    mask = torch.rand(p.shape) >= 0.95
    p.grad = torch.randn(p.shape)
    optimizer = SparseOpt([p], lr=1e-3, momentum=0.9, masks={p: mask}, backend="cpu")
    optimizer.step()

    def step() -> None:
        mask.logical_not_().logical_not_()  # two more versions
        optimizer.step()

    return step


def _update(shapes: Sequence[tuple[int, ...]]) -> Callable[[], None]:
    from sparseopt_kernels import RigL

    torch.manual_seed(0)
    parameters = [Parameter(torch.randn(shape)) for shape in shapes]
    masks = {p: torch.rand(p.shape) >= 0.95 for p in parameters}
    gradients = cycle([[torch.randn(p.shape) for p in parameters] for _ in range(2)])
    topology = RigL(masks, update_every=2, stop_at=10**9, skip_step=False)

    def update() -> None:
        for p, gradient in zip(parameters, next(gradients), strict=True):
            p.grad = gradient  # by another one, other weights grow
        topology.step()
        topology.step()

    return update


_LARGE = [(4096, 2048)] * 2
_SMALL = [(32, 32)] * 64
_RESNET20: list[tuple[int, ...]] = [
    (16, 3, 3, 3),
    *[(16, 16, 3, 3)] * 6,
    (32, 16, 3, 3),
    *[(32, 32, 3, 3)] * 5,
]
_RESNET20 += [(64, 32, 3, 3), *[(64, 64, 3, 3)] * 5, (10, 64)]

WORKS: dict[str, Callable[[], Callable[[], None]]] = {
    **{f"large {s:g}": partial(_step, _LARGE, s) for s in (0.5, 0.8, 0.9, 0.95, 0.97, 0.99)},
    "ResNet-20 0.9": partial(_step, _RESNET20, 0.9),
    "small layers": partial(_step, _SMALL, 0.9),
    "many layers": partial(_step, [(32, 32)] * 3162, 0.9),
    "new masks": _new_masks,
    "RigL update": partial(_update, _LARGE),
    "small RigL update": partial(_update, _RESNET20),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time the native library with other tuning constants.")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each build (%(default)s)")
    parser.add_argument("--only", nargs="+", default=[c.name for c in CONSTANTS], metavar="CONSTANT")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        return _work()

    from sparseopt_kernels.lab.machine import machine
    from sparseopt_kernels.text_table import aligned

    print(f"{machine()}; PyTorch {torch.__version__}; {torch.get_num_threads()} threads")
    rows = [("constant", "value", "work", "time / time as it is", "noise")]
    with tempfile.TemporaryDirectory() as folder:
        sources = Sources(Path(folder))
        for constant in CONSTANTS:
            if constant.name in options.only:
                for value, work, ratio, noise in _compared(constant, sources, options.rounds):
                    rows.append((constant.name, value, work, f"{ratio:.2f}", f"{noise:.2f}"))
                    print(*rows[-1], sep="  ", file=sys.stderr)
    print("\n".join(aligned(rows)))
    return 0


def _compared(constant: Constant, sources: Sources, rounds: int) -> Iterator[tuple[str, str, float, float]]:
    """Yield value, work, and the time that the work takes with it, as a multiple of the time as it is.

    The last number is the longer time of the two processes as it is, as a multiple of the shorter one.
    """
    source = (ROOT / "csrc" / "cpu" / constant.file).read_text()
    match = re.search(constant.definition, source)
    assert match is not None, f"{constant.name} is not in {constant.file}"
    values = (match[2], *constant.values)
    with ExitStack() as stack:
        packages = [
            sources.built_with(constant.file, re.sub(constant.definition, rf"\g<1>{value}", source, count=1))
            for value in values
        ]
        sources.built_with(constant.file, source)
        workers = [stack.enter_context(_worker(package)) for package in (packages[0], *packages)]
        for work in constant.works:
            first, second, *others = map(median, _times(workers, work, rounds))
            noise = max(first, second) / min(first, second)
            for value, own in zip(constant.values, others, strict=True):
                yield f"{value} (is {match[2]})", work, own / fmean((first, second)), noise


def _times(workers: Sequence[subprocess.Popen[str]], work: str, rounds: int) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in workers]
    turns = deque(zip(times, workers, strict=True))
    for turn in range(rounds + 1):
        for own, worker in turns:
            assert worker.stdin is not None
            assert worker.stdout is not None
            print(work, file=worker.stdin, flush=True)
            line = worker.stdout.readline()
            if not line:
                raise RuntimeError(f"{work!r}: the process of a build ended with code {worker.wait()}")
            if turn > 0:  # the first turn makes it ready
                own.append(json.loads(line))
        turns.rotate()  # so that no build always follows the same other one
    return times


class Sources:
    """A copy of the sources, in which one file is another at a time. What that changes is built again."""

    def __init__(self, folder: Path) -> None:
        import pybind11

        self._folder, self._builds = folder, 0
        for name in ("csrc", "sparseopt_kernels"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        shutil.copy(ROOT / "CMakeLists.txt", folder)
        self._run(
            *("cmake", "-G", "Ninja", "-S", str(folder), "-B", str(folder / "build")),
            *("-DSPARSEOPT_CUDA=OFF", f"-DPython_EXECUTABLE={sys.executable}"),
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        )

    def built_with(self, file: str, source: str) -> Path:
        """Return a folder with the package, whose library was built with this source of a file."""
        (self._folder / "csrc" / "cpu" / file).write_text(source)
        self._run("cmake", "--build", str(self._folder / "build"))
        self._builds += 1
        target = self._folder / str(self._builds)
        shutil.copytree(self._folder / "sparseopt_kernels", target / "sparseopt_kernels")
        for library in (self._folder / "build").glob("_native*.so"):
            shutil.copy(library, target / "sparseopt_kernels")
        return target

    def _run(self, *command: str) -> None:
        # cmake and ninja may be installed beside Python.
        tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PATH": tools})


@contextmanager
def _worker(package: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a process that has the package in that folder."""
    worker = subprocess.Popen(
        [sys.executable, __file__, "--worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(package)},
    )
    try:
        yield worker
    finally:
        worker.kill()
        worker.wait()


def _work() -> int:
    """Time the work that each line of the standard input names, for about 30 ms: seconds as JSON."""
    ready: dict[str, Callable[[], None]] = {}
    for line in sys.stdin:
        name = line.strip()
        if name not in ready:
            ready.clear()  # memory for one is enough
            ready[name] = WORKS[name]()
        step = ready[name]
        taken: list[float] = []
        end = time.perf_counter() + 0.03
        while len(taken) < 3 or time.perf_counter() < end:
            start = time.perf_counter()
            step()
            taken.append(time.perf_counter() - start)
        print(json.dumps(median(taken)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
