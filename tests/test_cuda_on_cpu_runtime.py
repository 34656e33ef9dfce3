"""The CUDA sources, run on the CPU: that the stand-in is one, and the library alone, call by call."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from cuda_on_cpu.build import Substitution, build, build_probes, compiler, load
from cuda_on_cpu.calls import DTYPES, Hyper, Weight, addresses, assert_near, step
from packing import check_pack, cuda_pack, random_mask

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
    assert probe("count_with_atomics", 2, 256, 1) == ("cudaSuccess", [2 * 255 * 128])


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


def check_steps(cuda: ModuleType, weights: Sequence[Weight]) -> None:
    for weight in weights:
        expected = weight.expected(Hyper())
        step(cuda, [weight], [Hyper().rule(cuda)])
        assert_near(weight, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("columns", [1, 7, 8, 27, 100, 256, 257, 2048, 2049, 4104])
def test_rows_of_any_length(cuda: ModuleType, columns: int, offset: int, dtype: str) -> None:
    check_steps(cuda, [Weight(dtype, 21 if columns < 2000 else 3, columns, offset=offset)])


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
def test_hyperparameters(cuda: ModuleType, density, correction, hyper, momentum) -> None:
    hyper = Hyper(correction=correction, **hyper)
    weight = Weight(density=density, momentum=momentum, ham=hyper.ham_alpha != 0)
    expected = weight.expected(hyper)
    step(cuda, [weight], [hyper.rule(cuda)])
    assert_near(weight, expected)


def test_gradients_and_weights_that_are_masked_do_not_matter(cuda: ModuleType) -> None:
    weight, other = Weight(), Weight()
    for rubbish in (weight.p, weight.b):
        rubbish[~weight.mask] = -float("inf")
    untouched = np.repeat(weight.bits == 0, 8, axis=1)[:, : weight.columns]
    step(cuda, [weight], [Hyper().rule(cuda)])
    step(cuda, [other], [Hyper().rule(cuda)])
    outside = ~weight.mask.numpy()
    assert untouched.any()
    assert (outside & ~untouched).any()
    for changed, expected in ((weight.p, other.p), (weight.b, other.b)):
        assert torch.equal(changed[weight.mask], expected[weight.mask])
        assert (changed.numpy()[outside & ~untouched] == 0).all()
        assert np.isneginf(changed.numpy()[untouched]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_scalars_are_read_on_the_device(cuda: ModuleType, dtype: str) -> None:
    wide = torch.float64 if dtype == "float64" else torch.float32
    lr, gamma = torch.tensor(0.5, dtype=wide), torch.tensor(2.0, dtype=wide)
    scale, found_inf = torch.tensor(8.0), torch.tensor(0.0)
    weight = Weight(dtype)
    expected = weight.expected(Hyper(lr=0.5), gamma=2.0 / 8.0)
    rule = Hyper().rule(cuda, lr_address=lr.data_ptr(), gamma_address=gamma.data_ptr())
    step(cuda, [weight], [rule], grad_scale=scale.data_ptr(), found_inf=found_inf.data_ptr())
    assert_near(weight, expected)


def test_found_inf_leaves_everything_as_it_is(cuda: ModuleType) -> None:
    weight, found_inf = Weight(), torch.tensor(2.0)
    before = weight.p.clone(), weight.b.clone()
    step(cuda, [weight], [Hyper().rule(cuda)], found_inf=found_inf.data_ptr())
    assert torch.equal(weight.p, before[0])
    assert torch.equal(weight.b, before[1])


def test_a_table_that_is_too_large_makes_several_launches(cuda: ModuleType, control: ctypes.CDLL) -> None:
    capacity = cuda.LAUNCH_CAPACITY
    for count, launches in [(0, 0), (1, 1), (capacity, 1), (capacity + 1, 2)]:
        weights = [Weight(rows=3, columns=20, density=None if i % 3 else 0.5, seed=i) for i in range(count)]
        expected = [weight.expected(Hyper()) for weight in weights]
        before = control.cuda_on_cpu_launches()
        assert step(cuda, weights, [Hyper().rule(cuda)]) == launches
        assert control.cuda_on_cpu_launches() - before == launches
        for weight, result in zip(weights, expected, strict=True):
            assert_near(weight, result)


def test_each_tensor_has_the_rule_of_its_group(cuda: ModuleType) -> None:
    hypers = [Hyper(lr=0.1 * (i + 1)) for i in range(5)]
    groups = [i % 5 for i in range(15)]
    weights = [Weight(rows=3, columns=20, seed=i) for i in range(15)]
    expected = [weight.expected(hypers[group]) for weight, group in zip(weights, groups, strict=True)]
    rules = [hyper.rule(cuda) for hyper in hypers]
    assert step(cuda, weights, rules, groups=groups) == 2  # four rules in the first, one in the second
    for weight, result in zip(weights, expected, strict=True):
        assert_near(weight, result)


def test_tensors_without_elements_make_no_launch(cuda: ModuleType) -> None:
    weights = [Weight(rows=0), Weight(columns=0), Weight(rows=0, density=None)]
    assert step(cuda, weights, [Hyper().rule(cuda)]) == 0
    assert step(cuda, [*weights, Weight()], [Hyper().rule(cuda)]) == 1


def test_more_work_than_blocks(cuda_cache: Path) -> None:
    """With two blocks for a tensor, each takes several shares, as it does of a tensor of 2^30 weights."""
    cuda = load(build(cuda_cache, [Substitution("cuda/shares.h", "kMaxBlocks = 1 << 16", "kMaxBlocks = 2")]))
    check_steps(cuda, [Weight(columns=2100, rows=7), Weight(rows=40), Weight(rows=99, density=None)])
    check_pack(cuda_pack(cuda), random_mask(1, 1, 70, 70, density=0.5, seed=0))


@pytest.mark.parametrize(
    "mutation",
    [
        Substitution(
            "cuda/rows.h", "left < kLanes ? static_cast<int>(left)", "left < 1 ? static_cast<int>(left)"
        ),
        Substitution("cuda/rows.h", "i = begin; i < bytes;", "i = begin; i < bytes - 1;"),
        Substitution("cuda/octet.h", "% sizeof(uint4) == 0", "% sizeof(float) == 0"),
        Substitution("cuda/rows.h", "__syncthreads();\n  value = 0;", "value = 0;"),
    ],
    ids=["weights beyond the row", "a byte less", "unaligned vectors", "no barrier"],
)
def test_a_mistake_is_found(cuda_cache: Path, mutation: Substitution) -> None:
    cuda = load(build(cuda_cache, [mutation]))
    with pytest.raises((AssertionError, RuntimeError), match=r"not close|written behind|cuda_on_cpu: "):
        check_steps(cuda, [Weight(columns=27), Weight(columns=2101, rows=3)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("correction", ["layer", "none"])
def test_squared_norm(cuda: ModuleType, dtype: str, correction: str) -> None:
    weights = [Weight(dtype, 30, 100), Weight(dtype, 3, 4100), Weight(dtype, 9, 999, None), Weight(dtype, 0)]
    hyper = Hyper(correction=correction)
    table = cuda.Table([weight.tensor(cuda) for weight in weights], [0] * len(weights))
    wide = torch.float64 if dtype == "float64" else torch.float32
    sums = torch.empty(cuda.partial_sum_count(table), dtype=wide)
    cuda.squared_norm(table, addresses(weights), [hyper.rule(cuda)], sums.data_ptr(), 0)
    terms = [(w.scale(correction) * torch.where(w.mask, w.g.double(), 0.0)).square().sum() for w in weights]
    tolerance = 1e-14 if dtype == "float64" else 1e-7  # c_i, rounded to float32
    assert sums.double().sum().item() == pytest.approx(float(sum(terms)), rel=tolerance)


def test_a_gradient_norm_is_infinite_or_nan_if_a_gradient_is(cuda: ModuleType) -> None:
    for value in (float("inf"), float("nan"), 1e30):
        weight = Weight(density=None)
        weight.g[3, 5] = value
        table = cuda.Table([weight.tensor(cuda)], [0])
        sums = torch.empty(cuda.partial_sum_count(table))
        cuda.squared_norm(table, addresses([weight]), [Hyper().rule(cuda)], sums.data_ptr(), 0)
        total = sums.double().sum().item()
        assert np.isnan(total) if np.isnan(value) else total == float("inf")


def test_an_error_is_raised_by_its_name(cuda: ModuleType, control: ctypes.CDLL) -> None:
    weight = Weight()
    before = weight.p.clone()
    control.cuda_on_cpu_fail_next(INVALID_VALUE)
    with pytest.raises(
        RuntimeError, match=r"^cudaErrorInvalidValue: invalid argument \(launching the step\)$"
    ):
        step(cuda, [weight], [Hyper().rule(cuda)])
    assert torch.equal(weight.p, before)
    with pytest.raises(RuntimeError, match=r"^cudaErrorInvalidValue: .* \(zeroing the count of a mask\)$"):
        cuda.pack(0, 1, 1, 0, 0, 0)
    step(cuda, [weight], [Hyper().rule(cuda)])
    assert not torch.equal(weight.p, before)


NOTHING = {
    **{"dtype": "float32", "parameter": 0, "momentum_buffer": 0, "rows": 1, "columns": 0, "ham": False},
    **{"bits": 0, "mean_fan_in": 0},
}


def test_wrong_arguments_are_refused(cuda: ModuleType) -> None:
    with pytest.raises(ValueError, match="dtype is 'int8', it must be"):
        cuda.Tensor(**{**NOTHING, "dtype": "int8"})
    with pytest.raises(ValueError, match="rows is 2, it must be 1 where there are no bits"):
        cuda.Tensor(**{**NOTHING, "rows": 2})
    with pytest.raises(ValueError, match="mean_fan_in is 0, it must be an address"):
        cuda.Tensor(**{**NOTHING, "bits": 64})
    with pytest.raises(ValueError, match="correction is 'erk', it must be"):
        Hyper(correction="erk").rule(cuda)
    mixed = [Weight("float32"), Weight("float16")]
    with pytest.raises(ValueError, match="must be of one dtype"):
        cuda.Table([weight.tensor(cuda) for weight in mixed], [0, 0])
    table = cuda.Table([Weight().tensor(cuda)], [0])
    with pytest.raises(ValueError, match="grads must have one address per tensor"):
        cuda.step(table, b"", [Hyper().rule(cuda)], 0, 0, 0)
    with pytest.raises(ValueError, match="rules must have one element per group"):
        step(cuda, [Weight()], [])
