"""The CUDA sources, run on the CPU: lists of sectors against a plain computation, and the steps over them
against the one pass over neurons, bit for bit. Each kind of mistake in them turns a test red."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from built_once import load
from cuda_on_cpu.build import compiler
from cuda_on_cpu.calls import DTYPES, Hyper, Weight, inputs_of, loaded, plan_of, step
from cuda_on_cpu.far import SIZES, sectors_far, step_far
from cuda_on_cpu.mistakes import make_mistake
from hypothesis import given, settings
from hypothesis import strategies as st
from sector_lists import assert_lists
from side_by_side import same_bits
from torch import Tensor

from sparseopt_kernels.correction import Correction
from sparseopt_kernels.kernels.gpu import cuda as backend
from sparseopt_kernels.kernels.gpu.lists import LISTED, Sectors, list_masks, weights_per_sector
from sparseopt_kernels.kernels.gpu.tables import SectorLaunch, SectorRow
from sparseopt_kernels.kernels.memory import Rows

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def _cuda(cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded(cuda, monkeypatch)


# ---- lists ------------------------------------------------------------------------------------------


def masked_weight(mask: Tensor, dtype: str) -> Weight:
    weight = Weight(dtype, mask.shape[0], mask.shape[1], density=1.0)
    weight.apply(mask)
    return weight


def listed(weights: list[Weight]) -> list[Sectors]:
    rows = [Rows(w.rows, w.columns, w.mask) for w in weights]
    return list_masks(backend.CudaKernels(), [w.param() for w in weights], rows)


def check_lists(weights: list[Weight]) -> None:
    """Against a plain computation; where there is no room, nothing is written."""
    for weight, sectors in zip(weights, listed(weights), strict=True):
        assert_lists(sectors, weight.mask, weight.p.dtype)


def random_masks(seed: int, dtype: str = "float32") -> list[Weight]:
    """Of rows that end within sectors or with them, and more than 32 sectors long."""
    rng = np.random.default_rng(seed)
    shapes = [(7, 1), (40, 3), (5, 27), (6, 64), (3, 129), (2, 3000), (1, 8)]
    densities = [0.4, 0.02, 1.0, 0.0, 0.3]
    return [
        masked_weight(torch.from_numpy(rng.random(shape) < densities[(seed + i) % 5]), dtype)
        for i, shape in enumerate(shapes)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 700),
    density=st.sampled_from([0.0, 0.02, 0.2, 0.8, 1.0]),
    seed=st.integers(0, 1000),
)
def test_lists_of_any_mask(dtype: str, rows: int, columns: int, density: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    check_lists([masked_weight(torch.from_numpy(rng.random((rows, columns)) < density), dtype)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_lists_of_several_masks(dtype: str) -> None:
    """In one listing: the sums of all of them are one."""
    for seed in range(5):
        check_lists(random_masks(seed, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_list_has_room_for_so_many(dtype: str) -> None:
    """One more, and all sectors are by_sectors."""
    lanes = weights_per_sector(DTYPES[dtype])
    room = int(LISTED * 10)
    for live, is_listed in ((room - 1, True), (room, True), (room + 1, False), (10, False)):
        mask = torch.zeros(10, lanes, dtype=torch.bool)
        mask[:live, 1] = True
        weight, other = masked_weight(mask, dtype), masked_weight(mask, dtype)
        check_lists([weight])
        plan = plan_of([weight], by_sectors=True)
        inputs = inputs_of([weight], [Hyper().rule()])
        plan.step(inputs)
        (launch,) = plan._place(inputs.addresses, []).layout.launches
        assert isinstance(launch, SectorLaunch)
        (row,) = (SectorRow(*numbers) for numbers in launch.table.tolist())
        assert (row.listed != 0) == is_listed
        assert row.length == (live if is_listed else 10)
        step([other], [Hyper().rule()], by_sectors=False)
        assert same_bits(weight.p, other.p)


def mask_of_bytes(rows: int, columns: int) -> Tensor:
    """Any byte but 0 is true; behind the end, there is what must not be read as mask."""
    rng = np.random.default_rng(3)
    values = torch.full((rows * columns + 64,), 255, dtype=torch.uint8)
    values[: rows * columns] = torch.from_numpy(
        rng.choice(np.array([0, 0, 0, 0, 0, 0, 1, 2, 128, 255], np.uint8), rows * columns)
    )
    return values[: rows * columns].view(torch.bool).view(rows, columns)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 27), (6, 64), (1, 4), (3, 2500)])
def test_any_byte_but_0_is_true(dtype: str, shape: tuple[int, int]) -> None:
    mask = mask_of_bytes(*shape)
    check_lists([masked_weight(mask, dtype)])
    true = torch.from_numpy(mask.numpy().view(np.uint8) != 0)
    for by_sectors in (False, True):
        weight, other = masked_weight(mask, dtype), masked_weight(true, dtype)
        for w in (weight, other):
            step([w], [Hyper().rule()], by_sectors=by_sectors)
        assert same_bits(weight.p, other.p)
        assert same_bits(weight.b, other.b)


# ---- steps by sectors against one pass --------------------------------------------------------------------


def check_sectors(make: Callable[[], list[Weight]], hypers: list[Hyper]) -> None:
    """From the same numbers, both ways."""
    rules = [hyper.rule(gamma=0.75) for hyper in hypers]
    first, second = make(), make()
    step(first, rules, by_sectors=False)
    step(second, rules, by_sectors=True)
    for a, b in zip(first, second, strict=True):
        assert same_bits(a.p, b.p), f"{a.rows} rows of {a.columns}"
        assert same_bits(a.b, b.b), f"{a.rows} rows of {a.columns}"
        assert all((guard == 77).all() for guard in (*a.guards, *b.guards)), "written behind the tensor"


HYPERS = {
    "momentum": Hyper(),
    "nesterov": Hyper(nesterov=True, dampening=0.0),
    "HAM": Hyper(ham_alpha=80.0, ham_beta=0.5),
    "unnormalized": Hyper(weight_decay=0.0),
    "none": Hyper(maximize=True),
}
CORRECTIONS: dict[str, Correction] = {"unnormalized": "unnormalized", "none": "none"}  # else "layer"


def rows_of_all_lengths(dtype: str, seed: int, kinds: Sequence[str], offset: int = 0) -> list[Weight]:
    rng = np.random.default_rng(seed)
    lengths = [*range(1, 40), 63, 64, 65, 127, 128, 576, 1000, 2048, 2049, 4608, *rng.integers(1, 5001, 4)]
    return [
        Weight(
            dtype,
            rows=int(rng.integers(1, 12)),
            columns=int(columns),
            density=float(rng.choice([0.01, 0.1, 0.5, 0.95])),
            momentum=bool(i % 5),
            offset=offset if i % 3 else 0,
            seed=seed + i,
            ham=i % 2 == 0,
            rule=i % len(kinds),
            correction=CORRECTIONS.get(kinds[i % len(kinds)], "layer"),
        )
        for i, columns in enumerate(lengths)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("kind", [*HYPERS, "mixed"])
def test_the_walk_has_the_bits_of_one_pass(dtype: str, offset: int, kind: str) -> None:
    kinds = [*HYPERS] if kind == "mixed" else [kind]
    check_sectors(lambda: rows_of_all_lengths(dtype, 11, kinds, offset), [HYPERS[kind] for kind in kinds])


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, deadline=None)
@given(
    columns=st.integers(1, 5000),
    rows=st.integers(1, 9),
    density=st.sampled_from([0.003, 0.05, 0.3, 0.9, 1.0]),
    kind=st.sampled_from(sorted(HYPERS)),
    momentum=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_walk_has_the_bits_of_one_pass_of_any_mask(
    dtype: str, columns: int, rows: int, density: float, kind: str, momentum: bool, seed: int
) -> None:
    correction = CORRECTIONS.get(kind, "layer")

    def weights() -> list[Weight]:
        offset = seed % 2
        return [
            Weight(dtype, rows, columns, density, momentum, offset, seed, ham=True, correction=correction)
        ]

    check_sectors(weights, [HYPERS[kind]])


# ---- weights far away -------------------------------------------------------------------------------

far = pytest.mark.skipif(sys.platform != "linux" or sys.maxsize < 2**40, reason="needs Linux, and 64 bits")


@far
@pytest.mark.parametrize("rows", SIZES.values(), ids=SIZES)
def test_one_pass_over_more_weights_than_32_bits_can_count(rows: int) -> None:
    step_far(rows)


@far
@pytest.mark.parametrize("is_listed", [True, False], ids=["listed", "all"])
@pytest.mark.parametrize("rows", SIZES.values(), ids=SIZES)
def test_a_walk_over_more_weights_than_32_bits_can_count(rows: int, is_listed: bool) -> None:
    sectors_far(rows, is_listed=is_listed)


# ---- mistakes that are found ------------------------------------------------------------------------


def lists() -> None:
    for dtype in ("float32", "float64", "bfloat16"):
        for seed in range(5):
            check_lists(random_masks(seed, dtype))


def full_lists() -> None:
    test_a_list_has_room_for_so_many("float32")


def bytes_of_masks() -> None:
    for shape in ((5, 27), (6, 64), (1, 4)):
        test_any_byte_but_0_is_true("float32", shape)


def sector_steps() -> None:
    for dtype in ("float32", "float16"):
        check_sectors(partial(rows_of_all_lengths, dtype, 11, [*HYPERS]), list(HYPERS.values()))


def far_walks() -> None:
    for is_listed in (True, False):
        sectors_far(SIZES["wide"], is_listed=is_listed)


def farther_walks() -> None:
    sectors_far(SIZES["wider"], is_listed=True)


def far_step() -> None:
    step_far(SIZES["wide"])


CHECKS = {
    lists: [
        "the number of a listed sector",
        "a place in the list",
        "the list of another row",
        "bits of the next row",
        "weights before the first sector",
        "the fan-in of a row",
    ],
    full_lists: ["a list too short"],
    bytes_of_masks: ["stale bits behind the tensor", "bytes that are true"],
    sector_steps: [
        "c_i of the next row",
        "c_i of no row",
        "c_i of the row before",
        "c_i of a third row",
        "c_i of one pass",
        "c_i of one pass where there is none",
        "where a row ends",
    ],
    far_walks: ["a sector that is cut to 32 bits", "a sector of gradients that is cut to 32 bits"],
    farther_walks: ["a sector that is cut to 32 bits without a sign", "a row that is found with 32 bits"],
    far_step: ["a neuron that is cut to 32 bits"],
}


@pytest.mark.parametrize(
    ("check", "mistake"),
    [(check, mistake) for check, mistakes in CHECKS.items() for mistake in (None, *mistakes)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_mistake_is_found(
    cuda_with_mistakes: Path, check: Callable[[], None], mistake: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if check in (far_walks, farther_walks, far_step) and sys.platform != "linux":
        pytest.skip("needs Linux")
    loaded(load(cuda_with_mistakes), monkeypatch)
    make_mistake(cuda_with_mistakes, mistake)
    with nullcontext() if mistake is None else pytest.raises(AssertionError):
        check()
