"""The model of a GPU's step: what it reads of compiled kernels, and what it says of queues one can reckon."""

from __future__ import annotations

import csv
import importlib.util
from collections import Counter
from pathlib import Path

import cuda_code
import pytest
import torch
from machine_code import accesses, cuobjdump
from machine_listings import code

if importlib.util.find_spec("triton") is None or cuobjdump() is None:
    pytest.skip("there is no Triton, or no disassembler", allow_module_level=True)
import gpu_model
import kernel_phases
from gpu_model import (
    MEMORIES,
    Layer,
    Memory,
    Multiprocessor,
    Program,
    chunks_of,
    floor_ns,
    layers_of,
    list_ratio,
    sector_ns,
    sgd_ns,
    two_digits,
)
from kernel_phases import Kernels, Phases
from networks import RESNET50

from sparseopt_kernels.kernels.gpu.lists import LISTED, weights_per_sector
from sparseopt_kernels.lab.bench.network import Shape

pytestmark = pytest.mark.compiled

HALF = Memory(efficiency=0.5, sectors=1)
NETWORKS: dict[str, tuple[list[Shape], int]] = {
    "ResNet-50": (RESNET50, 8),
    "ResNet-50, bfloat16": (RESNET50, 16),
    "4096x4096": ([(4096, 4096)], 8),
}


def traffic_rows() -> list[dict[str, str]]:
    """The totals of the networks that ``make traffic`` has counted; small ones are mostly tables."""
    path = Path(gpu_model.__file__).parent / "results" / "traffic.csv"
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["columns"] == "all"]
    return [row for row in rows if row["network"] in NETWORKS]


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return kernel_phases.triton_kernels()


@pytest.fixture(scope="module", params=["triton", "cuda"])
def sector_step(request: pytest.FixtureRequest, kernels: Kernels) -> Phases:
    if request.param == "triton":
        return kernels.sector_step
    found = kernel_phases.cuda_sector_step()
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


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=list(MEMORIES))
@pytest.mark.parametrize(("sparsity", "most"), [(0.0, 1.05), (0.9, 1.06), (0.95, 1.08), (0.99, 1.25)])
def test_a_step_of_a_resnet50_is_near_the_floor(
    sector_step: Phases, sparsity: float, most: float, memory: Memory
) -> None:
    """By the model, a step takes at most so many times as long as its memory."""
    layers = layers_of(RESNET50, sparsity)
    taken = sector_ns(layers, 8, sector_step, Multiprocessor(memory))
    assert 1.0 < taken / floor_ns(layers, 8, memory) <= most


def test_a_list_is_worth_its_bytes_up_to_the_share_that_is_listed(sector_step: Phases) -> None:
    """The comment beside ``LISTED`` quotes these."""
    sectors, pairs = MEMORIES["sectors"], MEMORIES["pairs"]
    assert list_ratio(0.2, sector_step, sectors) < 0.8
    assert 0.98 < list_ratio(0.2, sector_step, pairs) < 1.0
    for memory in (sectors, pairs):
        assert 0.99 < list_ratio(LISTED, sector_step, memory) < 1.01
        assert 1.005 < list_ratio(0.8, sector_step, memory) < 1.05


@pytest.mark.parametrize("row", traffic_rows(), ids=lambda row: f"{row['network']}, {row['sparsity']}")
def test_the_bytes_of_the_model_are_those_that_were_counted(row: dict[str, str]) -> None:
    """``make traffic`` has counted them on masks that were drawn, and counts the table and c_i, too."""
    shapes, lanes = NETWORKS[row["network"]]
    layers = layers_of(shapes, float(row["sparsity"]))
    for memory, column in (("sectors", "sectors_bytes"), ("pairs", "pairs_bytes")):
        chunks = chunks_of(layers, lanes, MEMORIES[memory])
        moved = sum(gpu_model.SGD_ACCESSES * chunk.moved + chunk.list_bytes + 4 for chunk in chunks)
        assert moved == pytest.approx(float(row[column]), rel=0.01)


@pytest.mark.skipif(cuda_code.NVCC is None, reason="there is no nvcc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_round_of_the_cuda_kernel(dtype: torch.dtype) -> None:
    """Momentum with weight decay and c_i of Eq. 12, and what finds the next sector; and nothing that this
    takes no part of: a division by AMP's scale, numbers of 64 bits, weights one by one."""
    before, way, registers = kernel_phases.cuda_round(dtype)
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
    assert kernel_phases._triton_phases(listing, 40) == Phases(registers=40, before=4, loads=2, update=3)


def test_a_queue_of_bytes() -> None:
    """Requests at one time are served one after the other."""
    on = Multiprocessor(HALF)
    first, second = on.move(0.0, 100.0, 10.0), on.move(0.0, 100.0, 10.0)
    bandwidth = 0.5 * gpu_model.PEAK / gpu_model.MULTIPROCESSORS
    assert first == pytest.approx(100 / bandwidth + 10)
    assert second == pytest.approx(200 / bandwidth + 10)


def test_no_more_programs_at_a_time_than_there_is_room_for() -> None:
    def program() -> Program:
        now = yield 0.0
        yield now + 1000.0

    on = Multiprocessor(HALF)
    assert on.run([program() for _ in range(4)], 4) == pytest.approx(1000 + gpu_model.START)
    assert on.run([program() for _ in range(4)], 2) == pytest.approx(2 * (1000 + gpu_model.START))


def test_the_floor() -> None:
    """Of a dense layer 20 bytes a weight, of a masked one the mask's bits, too. More pairs are live."""
    dense, masked = Layer(1, 1000, 1.0, False), Layer(10, 800, 0.5, True)
    assert floor_ns([dense], 8, HALF) == pytest.approx(20_000 / (0.5 * gpu_model.PEAK))
    for memory, weights in ((HALF, 8), (HALF._replace(sectors=2), 16)):
        moved = 20 * 8000 * (1 - 0.5**weights) + 1000
        assert floor_ns([masked], 8, memory) == pytest.approx(moved / (0.5 * gpu_model.PEAK))


def test_dense_sgd() -> None:
    """20 bytes a weight, 10 in half precision, and the wait that no kernel is spared; masks do not matter."""
    layers = [Layer(1, 1000, 1.0, False), Layer(10, 800, 0.5, True)]
    for lanes, size in ((8, 20), (16, 10)):
        waited = sgd_ns(layers, lanes, HALF) - size * 9000 / (0.5 * gpu_model.PEAK)
        assert waited == pytest.approx(gpu_model.START + gpu_model.DRAM)


def test_a_range_has_two_digits() -> None:
    assert two_digits([101.4, 53.44]) == "53-100"
    assert two_digits([3.04, 2.1]) == "2.1-3.0"
    assert two_digits([0.986, 0.991]) == "0.99"
