"""What a change of a mask asks for: natively and in PyTorch, the same."""

from __future__ import annotations

import pytest
import torch
from rules import DTYPES
from side_by_side import pattern_mask, same_bits
from torch import Tensor
from torch.autograd.graph import increment_version

from sparseopt_kernels import native_library
from sparseopt_kernels.step.zero_outside import zero_outside

SHAPES = [(), (1,), (7,), (3, 5), (65, 63), (64, 64), (5, 4099), (300, 700), (8, 3, 3, 3), (0, 4)]
ANYTHING = [
    *DTYPES,
    pytest.param(torch.complex64, id="complex64"),
    pytest.param(torch.complex128, id="complex128"),
]


@pytest.fixture(params=["native", "pytorch"], autouse=True)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "pytorch":
        monkeypatch.setattr(native_library, "MISSING", "left out")
    elif native_library.MISSING is not None:
        pytest.skip("the native library was not built")


def awkward(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Random numbers, and NaN, infinities and -0.0 among them."""
    tensor = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    flat = tensor.view(-1)
    for i, value in enumerate((torch.nan, torch.inf, -torch.inf, -0.0)):
        flat[i::11] = value
    return tensor


@pytest.mark.parametrize("dtype", ANYTHING)
@pytest.mark.parametrize("pattern", ["half", "sparse99", "full", "empty", "tail"])
def test_outside_a_mask_is_zero_and_inside_nothing_changes(dtype: torch.dtype, pattern: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        mask = pattern_mask(pattern, shape, generator)
        before = awkward(shape, dtype, generator)
        tensors = [before.clone(), before.clone()]
        zero_outside(mask, tensors)
        for tensor in tensors:
            assert same_bits(tensor, torch.where(mask, before, torch.zeros((), dtype=dtype))), shape


def test_what_lies_behind_a_tensor_is_left_alone() -> None:
    storage = torch.ones(200)
    zero_outside(torch.zeros(99, dtype=torch.bool), [storage[50:149]])
    assert storage.nonzero().flatten().tolist() == [*range(50), *range(149, 200)]


@pytest.mark.parametrize("mask_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_formats(memory_format: torch.memory_format, mask_format: torch.memory_format) -> None:
    mask = (torch.rand(4, 5, 3, 3) > 0.5).to(memory_format=mask_format)
    before = torch.randn(4, 5, 3, 3).to(memory_format=memory_format)
    tensor = before.clone()
    zero_outside(mask, [tensor])
    assert torch.equal(tensor, before * mask)
    gaps = torch.ones(4, 10, 3, 3)
    zero_outside(mask, [gaps[:, ::2]])
    assert torch.equal(gaps[:, ::2], mask.float())
    assert gaps[:, 1::2].all()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        mask = torch.rand(1000, 1001) > 0.9
        tensor = torch.ones(1000, 1001)
        zero_outside(mask, [tensor])
        assert torch.equal(tensor, mask.float())
    finally:
        torch.set_num_threads(before)


def test_autograd_notices_a_weight_that_was_zeroed() -> None:
    weight = torch.ones(3, requires_grad=True)
    loss = (weight * weight).sum()
    with torch.no_grad():
        zero_outside(torch.tensor([True, False, True]), [weight])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.skipif(native_library.MISSING is not None, reason="there is no native library")
def test_the_version_is_raised_before_the_weights_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C between the two leaves no write that was not counted."""
    monkeypatch.setattr(native_library, "MISSING", None)  # PyTorch counts its own
    weight = torch.ones(3)
    version, seen = weight._version, []

    def counting(tensor: Tensor) -> None:
        seen.append(weight.tolist())
        increment_version(tensor)

    monkeypatch.setattr("torch.autograd.graph.increment_version", counting)
    zero_outside(torch.tensor([True, False, True]), [weight])
    assert seen == [[1.0, 1.0, 1.0]]
    assert weight.tolist() == [1.0, 0.0, 1.0]
    assert weight._version == version + 1


def test_inference_tensors() -> None:
    with torch.inference_mode():
        tensor = torch.ones(3)
        zero_outside(torch.tensor([True, False, True]), [tensor])
        assert tensor.tolist() == [1.0, 0.0, 1.0]
