"""What the CUDA sources ask of the runtime, seen by the stand-in: streams, numbers of blocks, errors; and the
arguments that a launch carries. Each kind of mistake in them turns a test red."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from built_once import load
from cuda_on_cpu.build import compiler
from cuda_on_cpu.calls import Hyper, Weight, assert_near, inputs_of, loaded, plan_of, step
from cuda_on_cpu.mistakes import make_mistake

from sparseopt_kernels.kernels.gpu import cuda as backend
from sparseopt_kernels.kernels.gpu.tables import SectorLaunch

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")

INVALID_VALUE = 1  # cudaErrorInvalidValue
MULTIPROCESSORS = 3


class Runtime:
    """A build of the CUDA library, and what its stand-in for the runtime noted."""

    def __init__(self, path: Path, library: ModuleType) -> None:
        self.module, self._noted = library, ctypes.CDLL(str(path))
        self._noted.cuda_on_cpu_blocks.restype = self._noted.cuda_on_cpu_stream.restype = ctypes.c_int64

    def fail_next(self) -> None:
        self._noted.cuda_on_cpu_fail_next(INVALID_VALUE)

    def last_error(self) -> int:
        return self._noted.cuda_on_cpu_last_error()

    def blocks(self) -> int:
        return self._noted.cuda_on_cpu_blocks()

    def stream(self) -> int:
        return self._noted.cuda_on_cpu_stream()


@pytest.fixture
def runtime(cuda: ModuleType, cuda_library: Path, monkeypatch: pytest.MonkeyPatch) -> Runtime:
    loaded(cuda, monkeypatch)
    return Runtime(cuda_library, cuda)


# ---- checks -----------------------------------------------------------------------------------------


def launches_of(library: ModuleType) -> Iterator[tuple[str, Callable[[int], None]]]:
    """Each kernel, and its launch on a stream. There is one block, whose tensor has no weights; its memory is
    there until the next kernel is asked for."""
    table, index, sums = torch.zeros(16, dtype=torch.int64), torch.zeros(1, dtype=torch.int32), torch.zeros(2)
    memory = table.data_ptr(), index.data_ptr()
    launch = library.SectorLaunch("float32", *memory, table.data_ptr(), False, 1, 1)
    rules = [Hyper().rule()]
    yield "count_rows", partial(library.count_rows, "float32", *memory, 0, 0, 1)
    yield "list_sectors", partial(library.list_sectors, "float32", *memory, 0, 0, 0, 1)
    yield "masked_step", partial(library.masked_step, "float32", *memory, 1, bytes(8), rules, 0, 0)
    yield "sector_step", partial(library.sector_step, launch, bytes(8), rules, 0, 0)
    yield "sector_squares", partial(library.sector_squares, launch, bytes(8), sums.data_ptr())


def streams(runtime: Runtime) -> None:
    for number, (kernel, launch) in enumerate(launches_of(runtime.module), start=70):
        launch(number)
        assert runtime.stream() == number, kernel


def errors(runtime: Runtime) -> None:
    """The runtime keeps an error until it is asked for it: PyTorch's next call would report it."""
    for kernel, launch in launches_of(runtime.module):
        runtime.fail_next()
        with pytest.raises(RuntimeError, match=r"^cudaErrorInvalidValue: invalid argument"):
            launch(0)
        assert runtime.last_error() == 0, kernel


def launches_of_nothing(runtime: Runtime) -> None:
    """CUDA has no grid without blocks. Masks of no rows are such a case."""
    runtime.module.count_rows("float32", 0, 0, 0, 0, 0, 0)
    assert plan_of([Weight(rows=0)], by_sectors=False)


def driver(runtime: Runtime) -> None:
    assert runtime.module.driver_version() == 13000
    runtime.fail_next()
    with pytest.raises(RuntimeError, match=r"^cudaErrorInvalidValue.*\(asking for the version of the driver"):
        runtime.module.driver_version()


def blocks(runtime: Runtime) -> None:
    """As many as run at once, and no more than there are chunks for."""
    for rows, most in ((2, 1), (100, 4 * MULTIPROCESSORS)):
        weight = Weight(rows=rows, columns=400, density=None)
        plan, inputs = plan_of([weight], by_sectors=True), inputs_of([weight], [Hyper().rule()])
        plan.step(inputs)
        assert runtime.blocks() == most
        (launch,) = plan._place(inputs.addresses, []).layout.launches
        assert isinstance(launch, SectorLaunch)
        sums = torch.empty(1000)  # with room for more, and so for mistakes
        runtime.module.sector_squares(backend._native(launch), inputs.addresses, sums.data_ptr(), 0)
        assert runtime.blocks() == most


def dampening(runtime: Runtime) -> None:
    """1 - tau of a tau near 1: of its float32, there would be three digits left."""
    hyper = Hyper(dampening=0.9999, weight_decay=0.0)
    weight = Weight(density=None)
    weight.b.zero_()
    expected = weight.expected(hyper)
    step([weight], [hyper.rule()], by_sectors=True)
    assert_near(weight, expected)
    torch.testing.assert_close(weight.b.double(), expected[1], rtol=1e-6, atol=0.0)


CHECKS: dict[Callable[[Runtime], None], list[str]] = {
    streams: ["the default stream", "lists on the default stream", "a norm on the default stream"],
    errors: ["an error that stays"],
    launches_of_nothing: ["a launch of nothing"],
    driver: ["no version of the driver"],
    blocks: ["a step of a block for each eight chunks", "a norm of a block for each eight chunks"],
    dampening: ["dampening that was rounded"],
}


@pytest.fixture
def _multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "multiprocessors", lambda device: MULTIPROCESSORS)


named = pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)


@pytest.mark.usefixtures("_multiprocessors")
@named
def test_what_is_asked_of_the_runtime(runtime: Runtime, check: Callable[[Runtime], None]) -> None:
    check(runtime)


@pytest.mark.usefixtures("_multiprocessors")
@pytest.mark.parametrize(
    ("check", "mistake"),
    [(check, mistake) for check, mistakes in CHECKS.items() for mistake in (None, *mistakes)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_mistake_is_found(
    cuda_with_mistakes: Path,
    check: Callable[[Runtime], None],
    mistake: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = load(cuda_with_mistakes)
    loaded(library, monkeypatch)
    make_mistake(cuda_with_mistakes, mistake)
    found: Any = pytest.raises((AssertionError, RuntimeError, pytest.fail.Exception))
    with nullcontext() if mistake is None else found:
        check(Runtime(cuda_with_mistakes, library))
