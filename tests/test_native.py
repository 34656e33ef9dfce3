"""The native library alone: what it packs, and its types."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseopt_kernels.kernels import native

REASON = native.unavailable(torch.device("cpu"))
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"backend 'cpu': {REASON}")


@settings(max_examples=60, deadline=None)
@given(
    groups=st.integers(1, 3),
    segments=st.integers(1, 3),
    neurons=st.integers(1, 4),
    length=st.integers(0, 70),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_packed_bits_are_those_of_numpy(groups, segments, neurons, length, density, seed) -> None:
    from sparseopt_kernels import _native

    mask = np.random.default_rng(seed).random((groups, segments, neurons, length)) < density
    tensor = torch.from_numpy(mask).contiguous()
    packed = _native.PackedMask(tensor.data_ptr(), groups, segments, neurons, length)
    assert packed.nnz == mask.sum()
    for row in range(groups * neurons):
        group, neuron = divmod(row, neurons)
        runs = [np.packbits(mask[group, s, neuron], bitorder="little") for s in range(segments)]
        expected = np.concatenate(runs).tobytes()
        bits = packed.row_bits(row)
        assert bits == expected.ljust(len(bits), b"\0")
        assert len(bits) % 8 == 0


def test_unknown_names_are_refused() -> None:
    from sparseopt_kernels import _native

    with pytest.raises(ValueError, match="dtype is 'int8', it must be"):
        _native.Tensor("int8", 0, 0, 0, False, None)
    with pytest.raises(ValueError, match="correction is 'erk', it must be"):
        _native.Rule(0.1, 0, 0, 0, False, False, "erk", 0, 0, 1)
    with pytest.raises(IndexError):
        _native.PackedMask(torch.ones(1, dtype=torch.bool).data_ptr(), 1, 1, 1, 1).row_bits(1)


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparseopt_kernels.optimizer import SparseOpt

    monkeypatch.setenv("SPARSEOPT_CPU_ISA", "sse9")
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="SPARSEOPT_CPU_ISA is 'sse9', this processor can run"):
        SparseOpt([p], backend="cpu").step()
    assert p.tolist() == [1.0] * 3


def test_build_info_says_what_is_there() -> None:
    info = native.build_info()
    assert info["native"] is True
    assert info["isas"][-1] == "plain"
