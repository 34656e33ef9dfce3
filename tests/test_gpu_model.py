"""The model of a GPU's step: what it reads of compiled kernels, and what it says of queues one can reckon."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from machine_code import cuobjdump
from machine_listings import code

if importlib.util.find_spec("triton") is None or cuobjdump() is None:
    pytest.skip("there is no Triton, or no disassembler", allow_module_level=True)
import gpu_model
from gpu_model import Kernels, Layer, Multiprocessor, Phases, Program, floor_ns, layers_of, walk_ns
from networks import RESNET50

pytestmark = pytest.mark.compiled


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return gpu_model.triton_kernels()


@pytest.fixture(scope="module", params=["triton", "cuda"])
def walk(request: pytest.FixtureRequest, kernels: Kernels) -> Phases:
    if request.param == "triton":
        return kernels.walk
    return of_cuda(torch.float32)


def of_cuda(dtype: torch.dtype) -> Phases:
    found = gpu_model.cuda_walk(dtype)
    if found is None:
        pytest.skip("there is no nvcc")
    return found


def test_what_is_read_of_the_kernels(kernels: Kernels, walk: Phases) -> None:
    """Nothing that a kernel of loads, arithmetic and stores could not have."""
    for phases in (walk, kernels.masked):
        assert 32 <= phases.registers <= 96
        assert 20 <= phases.loads <= 400
        assert 50 <= phases.update <= 400
        assert 16 <= phases.programs() <= 32
    assert kernels.counting > 20


@pytest.mark.parametrize(("sparsity", "most"), [(0.0, 1.15), (0.9, 1.2), (0.95, 1.25), (0.99, 1.45)])
def test_the_walk_of_a_resnet50_is_near_the_floor(walk: Phases, sparsity: float, most: float) -> None:
    """By the model, a step takes at most so many times as long as its memory."""
    layers = layers_of(RESNET50, sparsity)
    assert 1.0 < walk_ns(layers, 8, walk, Multiprocessor()) / floor_ns(layers, 8) <= most


def test_a_type_with_more_weights_takes_more_instructions() -> None:
    """A sector has twice as many of them, and what is around them is the same."""
    single, half = (of_cuda(dtype) for dtype in (torch.float32, torch.bfloat16))
    assert abs(single.loads - half.loads) < 10
    assert 1.5 * single.update < half.update < 2 * single.update


def test_phases() -> None:
    listing = code(
        "S2R R0", "LDG.E R1", "IADD3 R1", "LDG.E R2", "LDG.E.128 R4", "FFMA R4", "STG.E.128 R4", "IADD3 R1",
        "@P0 BRA 0x20", "EXIT", "BRA 0xa0",
    )  # fmt: skip
    assert gpu_model._triton_phases(listing, 40) == Phases(registers=40, before=4, loads=2, update=3)


def test_a_queue_of_bytes() -> None:
    """Requests at one time are served one after the other."""
    on = Multiprocessor()
    first, second = on.move(0.0, 100.0, 10.0), on.move(0.0, 100.0, 10.0)
    assert first == pytest.approx(100 / gpu_model.BANDWIDTH + 10)
    assert second == pytest.approx(200 / gpu_model.BANDWIDTH + 10)


def test_no_more_programs_at_a_time_than_there_is_room_for() -> None:
    def program() -> Program:
        now = yield 0.0
        yield now + 1000.0

    on = Multiprocessor()
    assert on.run([program() for _ in range(4)], 4) == pytest.approx(1000 + gpu_model.START)
    assert on.run([program() for _ in range(4)], 2) == pytest.approx(2 * (1000 + gpu_model.START))


def test_the_floor() -> None:
    """Of a dense layer 20 bytes a weight, of a masked one the mask's bits besides."""
    assert floor_ns([Layer(1, 1000, 1.0, False)], 8) == pytest.approx(20_000 / gpu_model.PEAK)
    masked = floor_ns([Layer(10, 800, 0.5, True)], 8)
    assert masked == pytest.approx((20 * 8000 * (1 - 0.5**8) + 1000) / gpu_model.PEAK)
