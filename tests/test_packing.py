"""Packed masks: each backend's bits against a plain computation."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from cuda_on_cpu.build import compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from packing import Pack, check_native_pack, check_pack, cuda_pack, random_mask, torch_pack

from sparseopt_kernels.kernels import native, triton_plan

densities = st.sampled_from([0.0, 0.1, 0.5, 1.0])
seeds = st.integers(0, 1000)


@pytest.fixture(scope="module", params=["triton", pytest.param("cuda-emulated", marks=pytest.mark.compiled)])
def pack(request: pytest.FixtureRequest) -> Pack:
    if request.param == "triton":
        return torch_pack(triton_plan)
    if compiler() is None:
        pytest.skip("there is no C++ compiler")
    return cuda_pack(request.getfixturevalue("cuda"))


@settings(max_examples=100, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(0, 300), density=densities, seed=seeds)
def test_bits_of_rows(pack: Pack, rows: int, columns: int, density: float, seed: int) -> None:
    check_pack(pack, random_mask(1, 1, rows, columns, density, seed))


@settings(max_examples=60, deadline=None)
@given(
    groups=st.integers(1, 3),
    segments=st.integers(1, 3),
    neurons=st.integers(1, 4),
    length=st.integers(0, 70),
    density=densities,
    seed=seeds,
)
def test_bits_of_the_native_library(
    groups: int, segments: int, neurons: int, length: int, density: float, seed: int
) -> None:
    check_native_pack(native_library(), random_mask(groups, segments, neurons, length, density, seed), 1)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bits_of_the_native_library_do_not_depend_on_threads(threads: int) -> None:
    check_native_pack(native_library(), random_mask(1, 1, 301, 1001, 0.02, 0), threads)


def test_the_native_library_takes_any_byte_but_0_for_true() -> None:
    mask = torch.arange(256, dtype=torch.uint8)
    packed = native_library().PackedMask(mask.data_ptr(), 1, 1, 1, 256, 1)
    assert packed.bits == [0xFFFE] + [0xFFFF] * 15


def native_library() -> ModuleType:
    reason = native.NATIVE.unavailable(torch.device("cpu"))
    if reason is not None:
        pytest.skip(f"backend 'cpu': {reason}")
    from sparseopt_kernels import _native

    return _native


@pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
def test_no_rows_make_no_launch(cuda: ModuleType) -> None:
    """CUDA refuses a launch of nothing."""
    check_pack(cuda_pack(cuda), random_mask(1, 1, 0, 9, density=0.5, seed=0))
