"""The CUDA sources, run on the CPU: that the stand-in is one, and the library alone, call by call."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from built_once import load
from cuda_on_cpu.build import build_probes, compiler
from cuda_on_cpu.calls import (
    DTYPES,
    Hyper,
    Weight,
    assert_near,
    inputs_of,
    loaded,
    plan_of,
    squared_norm,
    step,
)
from cuda_on_cpu.mistakes import make_mistake

from sparseopt_kernels.correction import Correction
from sparseopt_kernels.kernels.contract import Rule
from sparseopt_kernels.kernels.gpu import lists, tables
from sparseopt_kernels.kernels.gpu.cuda import CudaKernels
from sparseopt_kernels.kernels.gpu.lists import ListRow
from sparseopt_kernels.kernels.gpu.tables import SectorRow, StepRow

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")

INVALID_VALUE = 1  # cudaErrorInvalidValue


@pytest.fixture(scope="session")
def control(cuda_library: Path) -> ctypes.CDLL:
    """What the stand-in exports beside the module: ``cuda_on_cpu_fail_next`` and ``cuda_on_cpu_launches``."""
    control = ctypes.CDLL(str(cuda_library))
    control.cuda_on_cpu_launches.restype = ctypes.c_int64
    return control


@pytest.fixture(scope="session")
def probe(cuda_cache: Path) -> Callable[[str, int, int, int], tuple[str, list[int]]]:
    """Runs a kernel of probes.cu: what came of it, and the ``size`` integers it wrote."""
    run = ctypes.CDLL(str(build_probes(cuda_cache))).run_probe
    run.restype = ctypes.c_char_p

    def run_probe(name: str, blocks: int, threads: int, size: int) -> tuple[str, list[int]]:
        out = np.zeros(size + 4, dtype=np.int32)
        start = -out.ctypes.data // 4 % 4  # of 16 aligned bytes
        pointer = ctypes.c_void_p(out[start:].ctypes.data)
        return run(name.encode(), blocks, threads, pointer).decode(), out[start : start + size].tolist()

    return run_probe


# The stand-in


def test_a_barrier_is_one(probe) -> None:
    expected = [*reversed(range(256))] * 3
    assert probe("reverse_through_shared_memory", 3, 256, 768) == ("cudaSuccess", expected)
    result, numbers = probe("without_a_barrier", 1, 256, 256)
    assert result == "cudaSuccess"
    assert 0 in numbers  # read before it was written


def test_shuffles_and_ballots_are_those_of_a_warp(probe) -> None:
    assert probe("warp_sum", 1, 64, 64) == ("cudaSuccess", [496] * 32 + [496 + 32 * 32] * 32)
    broadcast = [lane // 8 * 8 + 1 for lane in range(32)]
    down = [lane + 3 if lane % 8 < 5 else lane for lane in range(32)]
    assert probe("shuffle_within_width", 1, 32, 64) == ("cudaSuccess", broadcast + down)
    assert probe("ballot_of_odd_lanes", 1, 32, 32) == ("cudaSuccess", [0xAAAAAAAA - 2**32] * 32)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("barrier_of_half_a_block", "deadlock: thread 0 of block 0 waits at __syncthreads .* 32 of 64 have"),
        ("two_barriers", "deadlock: thread 0 of block 0 waits at __syncthreads"),
        ("shuffle_of_half_a_warp", "deadlock: thread 0 of block 0 waits at __shfl_xor_sync"),
        (
            "two_intrinsics",
            r"thread \d+ of block 0 is at __shfl_xor_sync .*, thread 0 of block 0 is at __ballot_sync",
        ),
        ("vector_at_an_odd_address", "is not aligned in .*probes.cu"),
    ],
)
def test_what_a_gpu_leaves_undefined_is_refused(probe, name: str, message: str) -> None:
    result, _ = probe(name, 1, 64, 512)
    assert re.match("cuda_on_cpu: .*" + message, result), result
    # Fibres that were left in the middle of a kernel do not spoil the next one.
    assert probe("warp_sum", 1, 32, 32) == ("cudaSuccess", [496] * 32)


def test_a_launch_of_nothing_is_refused(probe) -> None:
    assert probe("warp_sum", 0, 32, 32)[0] == "cudaErrorInvalidConfiguration"
    assert probe("warp_sum", 1, 2000, 2000)[0] == "cudaErrorInvalidConfiguration"


# The library


@pytest.fixture(params=[False, True], ids=["one-pass", "sectors"])
def by_sectors(request: pytest.FixtureRequest, cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Which kernel updates what has a mask."""
    loaded(cuda, monkeypatch)
    return request.param


def check_steps(weights: Sequence[Weight], *, by_sectors: bool) -> None:
    for weight in weights:
        expected = weight.expected(Hyper())
        step([weight], [Hyper().rule()], by_sectors=by_sectors)
        assert_near(weight, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("columns", [1, 2, 3, 7, 8, 27, 100, 256, 257, 2048, 2049, 4104])
def test_rows_of_any_length(by_sectors: bool, columns: int, offset: int, dtype: str) -> None:
    check_steps([Weight(dtype, 21 if columns < 2000 else 3, columns, offset=offset)], by_sectors=by_sectors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offsets", [(0, 1), (1, 0)], ids=["gradients", "others"])
@pytest.mark.parametrize("columns", [3, 64, 256, 4104])
def test_some_memory_is_not_aligned(
    by_sectors: bool, columns: int, offsets: tuple[int, int], dtype: str
) -> None:
    """Gradients alone, as those of DistributedDataParallel may be, or all but gradients."""
    check_steps(
        [Weight(dtype, 5, columns, offset=offsets[0], gradient_offset=offsets[1])], by_sectors=by_sectors
    )


@pytest.mark.parametrize("density", [None, 0.0, 0.02, 1.0], ids=["dense", "empty", "sparse", "full"])
@pytest.mark.parametrize("correction", ["layer", "unnormalized", "none"])
@pytest.mark.parametrize(
    "hyper",
    [
        {},
        {"nesterov": True, "dampening": 0.0},
        {"weight_decay": 0.0, "maximize": True},
        {"ham_alpha": 80.0, "ham_beta": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("momentum", [True, False], ids=["momentum", "plain"])
def test_hyperparameters(by_sectors: bool, density, correction, hyper, momentum) -> None:
    hyper = Hyper(**hyper)
    weight = Weight(density=density, momentum=momentum, ham=hyper.ham_alpha != 0, correction=correction)
    expected = weight.expected(hyper)
    step([weight], [hyper.rule()], by_sectors=by_sectors)
    assert_near(weight, expected)


def test_gradients_and_weights_that_are_masked_do_not_matter(by_sectors: bool) -> None:
    """What is in a piece of eight without an active weight, nobody reads or writes: here, rows are whole
    pieces."""
    weight, other = Weight(columns=104), Weight(columns=104)
    for rubbish in (weight.p, weight.b):
        rubbish[~weight.mask] = -float("inf")
    untouched = ~weight.mask.view(-1, 8).any(1, keepdim=True).expand(-1, 8).reshape(weight.mask.shape)
    step([weight], [Hyper().rule()], by_sectors=by_sectors)
    step([other], [Hyper().rule()], by_sectors=by_sectors)
    outside = ~weight.mask
    assert untouched.any()
    assert (outside & ~untouched).any()
    for changed, expected in ((weight.p, other.p), (weight.b, other.b)):
        assert torch.equal(changed[weight.mask], expected[weight.mask])
        assert (changed[outside & ~untouched] == 0).all()
        assert changed[untouched].isneginf().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_scalars_are_read_on_the_device(by_sectors: bool, dtype: str) -> None:
    wide = torch.float64 if dtype == "float64" else torch.float32
    lr, gamma = torch.tensor(0.5, dtype=wide), torch.tensor(2.0, dtype=wide)
    weight = Weight(dtype)
    expected = weight.expected(Hyper(lr=0.5), gamma=2.0 / 8.0)
    scaling = {"grad_scale": torch.tensor(8.0), "found_inf": torch.tensor(0.0)}
    step([weight], [Hyper().rule(lr=lr, gamma=gamma)], by_sectors=by_sectors, **scaling)
    assert_near(weight, expected)


def test_found_inf_leaves_everything_as_it_is(by_sectors: bool) -> None:
    weight = Weight()
    before = weight.p.clone(), weight.b.clone()
    step([weight], [Hyper().rule()], by_sectors=by_sectors, found_inf=torch.tensor(2.0))
    assert torch.equal(weight.p, before[0])
    assert torch.equal(weight.b, before[1])


def with_ready(launches: int, *, by_sectors: bool) -> int:
    """A step with new masks launches what the next step does, too, for nothing."""
    return launches if by_sectors else 2 * launches


def test_more_tensors_than_a_launch_takes_are_several_launches(by_sectors: bool, cuda, control) -> None:
    capacity = cuda.MOST_TENSORS
    for count, launches in [(1, 1), (capacity, 1), (capacity + 1, 2)]:
        weights = [Weight(rows=3, columns=20, density=0.5, seed=i) for i in range(count)]
        expected = [weight.expected(Hyper()) for weight in weights]
        plan, inputs = plan_of(weights, by_sectors=by_sectors), inputs_of(weights, [Hyper().rule()])
        before = control.cuda_on_cpu_launches()
        plan.step(inputs)
        assert control.cuda_on_cpu_launches() - before == with_ready(launches, by_sectors=by_sectors)
        for weight, result in zip(weights, expected, strict=True):
            assert_near(weight, result)


def test_each_tensor_has_the_rule_of_its_group(by_sectors: bool, cuda, control) -> None:
    count = cuda.MOST_RULES + 1
    hypers = [Hyper(lr=0.1 * (i + 1)) for i in range(count)]
    weights = [Weight(rows=3, columns=20, seed=i, rule=i % count) for i in range(3 * count)]
    expected = [weight.expected(hypers[weight.rule]) for weight in weights]
    plan = plan_of(weights, by_sectors=by_sectors)
    before = control.cuda_on_cpu_launches()
    plan.step(inputs_of(weights, [hyper.rule() for hyper in hypers]))
    # One rule did not fit into the first.
    assert control.cuda_on_cpu_launches() - before == with_ready(2, by_sectors=by_sectors)
    for weight, result in zip(weights, expected, strict=True):
        assert_near(weight, result)


def test_tensors_without_elements_make_no_launch(by_sectors: bool, control) -> None:
    weights = [Weight(rows=0), Weight(columns=0), Weight(rows=0, density=None)]
    for more, launches in (([], 0), ([Weight()], 1)):
        plan = plan_of([*weights, *more], by_sectors=by_sectors)
        before = control.cuda_on_cpu_launches()
        plan.step(inputs_of([*weights, *more], [Hyper().rule()]))
        assert control.cuda_on_cpu_launches() - before == with_ready(launches, by_sectors=by_sectors)


def test_more_chunks_than_warps(cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each warp takes several, of tensors of all kinds."""
    loaded(cuda, monkeypatch)
    weights = [Weight(columns=2100, rows=37), Weight(rows=40), Weight(rows=999, density=None)]
    expected = [weight.expected(Hyper()) for weight in weights]
    step(weights, [Hyper().rule()], by_sectors=True)
    for weight, result in zip(weights, expected, strict=True):
        assert_near(weight, result)


@pytest.mark.parametrize(
    ("by_sectors", "mistake"),
    [
        (False, None),
        (True, None),
        (False, "weights beyond the row"),
        (False, "no barrier"),
        (False, "unaligned gradients of new masks"),
        (True, "weights beyond the tensor"),
        (True, "unaligned"),
        (True, "unaligned gradients"),
        (True, "stride"),
        (True, "length"),
    ],
)
def test_a_mistake_is_found(
    cuda_with_mistakes: Path, by_sectors: bool, mistake: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded(load(cuda_with_mistakes), monkeypatch)
    make_mistake(cuda_with_mistakes, mistake)
    errors = r"not close|written behind|cuda_on_cpu: "
    found = pytest.raises((AssertionError, RuntimeError), match=errors)
    with nullcontext() if mistake is None else found:
        check_steps(
            [
                Weight(columns=27, rows=31),
                Weight(columns=2101, rows=13),
                Weight(offset=1),
                Weight(gradient_offset=1),
                Weight("bfloat16"),
            ],
            by_sectors=by_sectors,
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("correction", ["layer", "unnormalized", "none"])
def test_squared_norm(cuda: ModuleType, monkeypatch, dtype: str, correction: Correction) -> None:
    loaded(cuda, monkeypatch)
    weights = [Weight(dtype, 30, 100), Weight(dtype, 23, 4100), Weight(dtype, 9, 999, None), Weight(dtype, 0)]
    weights += [Weight(dtype, 40, 3, 0.5), Weight(dtype, 7, 27, offset=1)]
    for weight in weights:
        weight.correction = correction
    terms = [(w.scale() * torch.where(w.mask, w.g.double(), 0.0)).square().sum() for w in weights]
    tolerance = 1e-14 if dtype == "float64" else 1e-7  # c_i, rounded to float32
    found = squared_norm(weights, [Hyper().rule()])
    assert found == pytest.approx(float(sum(terms)), rel=tolerance)


def test_a_gradient_norm_is_infinite_or_nan_if_a_gradient_is(cuda: ModuleType, monkeypatch) -> None:
    loaded(cuda, monkeypatch)
    for value in (float("inf"), float("nan"), 1e30):
        weight = Weight(density=None)
        weight.g[3, 5] = value
        total = squared_norm([weight], [Hyper().rule()])
        assert np.isnan(total) if np.isnan(value) else total == float("inf")


def test_an_error_is_raised_by_its_name(by_sectors: bool, control: ctypes.CDLL) -> None:
    weight = Weight()
    before = weight.p.clone()
    plan, inputs = plan_of([weight], by_sectors=by_sectors), inputs_of([weight], [Hyper().rule()])
    control.cuda_on_cpu_fail_next(INVALID_VALUE)
    with pytest.raises(RuntimeError, match=r"^cudaErrorInvalidValue: invalid argument \(launching the step"):
        plan.step(inputs)
    assert torch.equal(weight.p, before)
    plan.step(inputs)
    assert not torch.equal(weight.p, before)


def test_an_error_while_lists_are_made_is_raised(cuda: ModuleType, control, monkeypatch) -> None:
    loaded(cuda, monkeypatch)
    control.cuda_on_cpu_fail_next(INVALID_VALUE)
    with pytest.raises(RuntimeError, match=r"\(launching the count of masks\)$"):
        plan_of([Weight()], by_sectors=False)


def test_an_error_of_the_gradient_norm_is_raised(cuda: ModuleType, control, monkeypatch) -> None:
    loaded(cuda, monkeypatch)
    control.cuda_on_cpu_fail_next(INVALID_VALUE)
    with pytest.raises(RuntimeError, match=r"\(launching the gradient norm\)$"):
        squared_norm([Weight(density=None)], [Hyper().rule()])


def test_wrong_arguments_are_refused(cuda: ModuleType) -> None:
    with pytest.raises(ValueError, match="dtype is 'int8', it must be"):
        cuda.SectorLaunch("int8", 0, 0, 0, False, 0, 1)
    nothing = cuda.SectorLaunch("float32", 0, 0, 0, False, 0, 1)
    rule: Any = Hyper().rule()
    with pytest.raises(TypeError, match="a rule must be a tuple of 9 fields"):
        cuda.sector_step(nothing, b"", [(0.1, 0.9)], 0, 0, 0)
    with pytest.raises(TypeError, match="must be real number, not str"):
        cuda.sector_step(nothing, b"", [rule._replace(lr="fast")], 0, 0, 0)
    for gradients, rules in ((cuda.MOST_TENSORS + 1, 1), (1, cuda.MOST_RULES + 1)):
        with pytest.raises(ValueError, match=f"{gradients} gradients and {rules} rules, a launch takes"):
            cuda.sector_step(nothing, bytes(8 * gradients), [rule] * rules, 0, 0, 0)


def test_numbers_of_any_kind_are_numbers(by_sectors: bool) -> None:
    weight = Weight()
    expected = weight.expected(Hyper(lr=1.0))
    step([weight], [Hyper().rule(lr=np.float32(1.0), gamma=1)], by_sectors=by_sectors)
    assert_near(weight, expected)


def test_tables_have_the_columns_that_kernels_read(cuda: ModuleType) -> None:
    """Names in the order of memory, from the declarations that the kernels are compiled with."""
    assert StepRow._fields == cuda.STEP_ROW
    assert SectorRow._fields == cuda.SECTOR_ROW
    assert ListRow._fields == cuda.LIST_ROW
    assert tables._RULES_PER_LAUNCH == cuda.MOST_RULES
    assert lists._SECTOR == cuda.SECTOR_BYTES
    assert Rule._fields == cuda.RULE


def test_work_is_shared_out_as_kernels_expect(cuda: ModuleType) -> None:
    sizes = CudaKernels.most_tensors, CudaKernels.chunk, CudaKernels.list_rows
    assert sizes == (cuda.MOST_TENSORS, cuda.CHUNK, cuda.LIST_ROWS)
    # A thread for eight weights, up to a warp; a block for a row of more than 2048.
    rows = {1: 256, 8: 256, 9: 128, 27: 64, 64: 32, 256: 8, 257: 8, 2048: 8, 2049: 1, 10**6: 1}
    assert {columns: cuda.step_rows(columns) for columns in rows} == rows


def test_blocks_are_as_many_as_run_at_once_or_as_there_is_work_for(cuda: ModuleType) -> None:
    def blocks(dtype: str, most_chunks: int) -> int:
        return cuda.SectorLaunch(dtype, 0, 0, 0, False, most_chunks, 132).blocks

    assert [blocks("float32", chunks) for chunks in (0, 1, 8, 9, 10**6)] == [0, 1, 1, 2, 4 * 132]
    assert blocks("float16", 10**6) == 4 * 132
    assert blocks("float64", 10**6) == 2 * 132


def test_the_version_of_the_driver(cuda: ModuleType) -> None:
    assert cuda.driver_version() == 13000
