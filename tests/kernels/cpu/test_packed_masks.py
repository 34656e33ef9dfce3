"""Packed masks of the native library: its bits against a plain computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparseopt_kernels import native_library

pytestmark = pytest.mark.skipif(
    native_library.MISSING is not None, reason=f"native library: {native_library.MISSING}"
)


def random_mask(groups: int, segments: int, neurons: int, length: int, density: float, seed: int) -> Tensor:
    shape = (groups, segments, neurons, length)
    return torch.from_numpy(np.random.default_rng(seed).random(shape) < density)


def check(mask: Tensor, threads: int) -> None:
    """The native library packs a tensor as it lies in memory: 16 weights to a number, whatever their rows."""
    flat = mask.flatten().tolist()
    groups, segments, neurons, length = mask.shape
    packed = native_library.PackedMask(mask.data_ptr(), groups, segments, neurons, length, threads)
    expected = [sum(bit << i for i, bit in enumerate(flat[at : at + 16])) for at in range(0, len(flat), 16)]
    assert packed.bits == expected
    fan_in = torch.empty(packed.neurons, dtype=torch.int64)
    packed.count_fan_in(fan_in.data_ptr(), threads)
    assert fan_in.tolist() == mask.sum(dim=(1, 3)).flatten().tolist()
    live = [i for i, bits in enumerate(expected) if bits]
    if len(live) > 0.9 * len(expected):  # as good as all
        live = []
    assert packed.live_blocks == live
    assert packed.live_bits == [expected[i] for i in live]


@settings(max_examples=60, deadline=None)
@given(
    groups=st.integers(1, 3),
    segments=st.integers(1, 3),
    neurons=st.integers(1, 4),
    length=st.integers(0, 70),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_bits(groups: int, segments: int, neurons: int, length: int, density: float, seed: int) -> None:
    check(random_mask(groups, segments, neurons, length, density, seed), 1)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bits_do_not_depend_on_threads(threads: int) -> None:
    check(random_mask(1, 1, 301, 1001, 0.02, 0), threads)


def test_any_byte_but_0_is_true() -> None:
    mask = torch.arange(256, dtype=torch.uint8)
    packed = native_library.PackedMask(mask.data_ptr(), 1, 1, 1, 256, 1)
    assert packed.bits == [0xFFFE] + [0xFFFF] * 15
    fan_in = torch.empty(1, dtype=torch.int64)
    packed.count_fan_in(fan_in.data_ptr(), 1)
    assert fan_in.tolist() == [255]
