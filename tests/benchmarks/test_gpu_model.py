"""The model of a GPU's step: what it reads of compiled kernels, and what it says of queues one can reckon."""

from __future__ import annotations

import importlib.util
from collections import Counter

import cuda_code
import pytest
import torch
from machine_code import accesses, cuobjdump
from machine_listings import code

if importlib.util.find_spec("triton") is None or cuobjdump() is None:
    pytest.skip("there is no Triton, or no disassembler", allow_module_level=True)
import gpu_model
from gpu_model import (
    Kernels,
    Layer,
    Multiprocessor,
    Phases,
    Program,
    floor_ns,
    layers_of,
    list_ratio,
    sector_ns,
)
from networks import RESNET50

from sparseopt_kernels.kernels.gpu.lists import LISTED, weights_per_sector

pytestmark = pytest.mark.compiled


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return gpu_model.triton_kernels()


@pytest.fixture(scope="module", params=["triton", "cuda"])
def sector_step(request: pytest.FixtureRequest, kernels: Kernels) -> Phases:
    if request.param == "triton":
        return kernels.sector_step
    found = gpu_model.cuda_sector_step()
    if found is None:
        pytest.skip("there is no nvcc")
    return found


def test_what_is_read_of_the_kernels(kernels: Kernels, sector_step: Phases) -> None:
    """Nothing that a kernel of loads, arithmetic and stores could not have."""
    for phases in (sector_step, kernels.masked):
        assert 32 <= phases.registers <= 96
        assert 20 <= phases.loads <= 400
        assert 50 <= phases.update <= 400
        assert 16 <= phases.programs() <= 32
    assert kernels.counting > 20


@pytest.mark.parametrize(("sparsity", "most"), [(0.0, 1.15), (0.9, 1.2), (0.95, 1.25), (0.99, 1.45)])
def test_a_step_of_a_resnet50_is_near_the_floor(sector_step: Phases, sparsity: float, most: float) -> None:
    """By the model, a step takes at most so many times as long as its memory."""
    layers = layers_of(RESNET50, sparsity)
    assert 1.0 < sector_ns(layers, 8, sector_step, Multiprocessor()) / floor_ns(layers, 8) <= most


def test_a_list_is_worth_its_bytes_up_to_the_share_that_is_listed(sector_step: Phases) -> None:
    """The comment beside ``LISTED`` quotes these."""
    assert list_ratio(0.2, sector_step) < 0.8
    assert 0.99 < list_ratio(LISTED, sector_step) < 1.005
    assert 1.005 < list_ratio(0.8, sector_step) < 1.05


@pytest.mark.skipif(cuda_code.NVCC is None, reason="there is no nvcc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_round_of_the_cuda_kernel(dtype: torch.dtype) -> None:
    """Momentum with weight decay and c_i of Eq. 12, and what finds the next sector; and nothing that this
    takes no part of: a division by AMP's scale, numbers of 64 bits, weights one by one."""
    before, way, registers = gpu_model.cuda_round(dtype)
    lanes = weights_per_sector(dtype)
    opcodes = [instruction.opcode for instruction in way]
    counts = Counter(opcode.split(".")[0] for opcode in opcodes)
    assert accesses(opcodes, "LDG")[128] == 6
    assert accesses(opcodes, "STG") == {128: 4}
    assert sum(opcode.startswith("LDG") and opcode.endswith(".CONSTANT") for opcode in opcodes) == 4
    assert counts["FFMA"] == 3 * lanes
    assert counts["I2F"] == counts["MUFU"] == 1
    assert not counts.keys() & {"FCHK", "CALL"}
    assert 20 < before < 200
    assert 32 < registers <= 64


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
