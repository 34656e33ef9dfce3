"""What vectors of numbers do, number by number: exponentials, roundings, and the ends of tensors."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from rules import DTYPES
from side_by_side import pattern_mask, same_bits
from torch import Tensor
from torch.nn.parameter import Parameter

from sparseopt_kernels.optimizer import SparseOpt

FLOATS_UP_TO_5 = 0x40A00000
"""The bits of 5.0: as integers, floats from 0 to 5 are all numbers up to it."""


def step(p: Tensor, gradient: Tensor, **options: object) -> Tensor:
    """What one step of the CPU backend makes of ``p``, which is written to."""
    parameter = Parameter(p)
    parameter.grad = gradient
    SparseOpt([parameter], backend="cpu", **options).step()  # type: ignore[arg-type]
    return parameter.detach()


def exponentials(x: Tensor) -> Tensor:
    """HAM's factor exp(x): the step before it is too small to move a weight of 1."""
    tiny = 2.0**-60
    return step(torch.ones_like(x), -x, lr=tiny, ham_alpha=1 / tiny)


def units_off(got: np.ndarray, want: np.ndarray) -> float:
    """The largest error in units of the last place of what is right, given in more digits than ``got``."""
    return float(np.max(np.abs(got - want) / np.spacing(want.astype(got.dtype)).astype(want.dtype)))


def float_chunks(start: int, stride: int) -> Iterator[Tensor]:
    """Floats in [-5, 5], every ``stride``-th, as (rows, 4096): HAM leaves vectors alone."""
    per_chunk = 1 << 24
    for first in range(start, FLOATS_UP_TO_5 + 1, per_chunk * stride):
        bits = np.arange(first, min(first + per_chunk * stride, FLOATS_UP_TO_5 + 1), stride, dtype=np.int32)
        bits = np.pad(bits, (0, -len(bits) % 4096), mode="edge")
        for sign in (0, -(1 << 31)):
            yield torch.from_numpy((bits | np.int32(sign)).view(np.float32).reshape(-1, 4096))


def worst_float(stride: int) -> float:
    worst = 0.0
    for x in float_chunks(stride // 2, stride):
        worst = max(worst, units_off(exponentials(x).numpy(), np.exp(x.numpy().astype(np.float64))))
    return worst


def test_exponentials_of_floats(isa: str) -> None:
    """Every 997th float in [-5, 5]."""
    assert worst_float(997) < 2


@pytest.mark.slow
def test_exponentials_of_70_million_floats(isa: str) -> None:
    """Every 31st float in [-5, 5]."""
    assert worst_float(31) < 2


def test_exponentials_of_doubles(isa: str) -> None:
    x = torch.linspace(-5, 5, 1 << 20, dtype=torch.float64).view(-1, 1024)
    assert units_off(exponentials(x).numpy(), np.exp(x.numpy().astype(np.longdouble))) < 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exponentials_of_what_is_no_small_number(isa: str, dtype: torch.dtype) -> None:
    """The exponent is held in [-5, 5]; NaN stays one; of 0 and of the smallest numbers it is 1."""
    x = torch.tensor([[9.0, -9.0, torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1e-45, -1e-45]], dtype=dtype)
    got = exponentials(x)
    torch.testing.assert_close(got[0, :2], torch.tensor([5.0, -5.0], dtype=dtype).exp())
    assert not got[0, 2:5].isfinite().any()  # an infinite gradient spoils the step before
    assert got[0, 5:].tolist() == [1.0] * 4


HALVES = [pytest.param(torch.bfloat16, id="bfloat16"), pytest.param(torch.float16, id="float16")]


def all_halves(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_every_half_is_read_and_written_as_it_is(isa: str, dtype: torch.dtype) -> None:
    numbers = all_halves(dtype)
    got = step(numbers.clone(), torch.zeros_like(numbers), lr=1.0)
    is_nan = numbers.isnan()
    assert same_bits(got[~is_nan], numbers[~is_nan])
    assert got[is_nan].isnan().all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("lr", [1.0, 0.5, 0.25, 0.375])
@pytest.mark.parametrize("distance", [0, 1, 2, 3, 7, 11])
def test_results_are_rounded_to_the_nearest_half(
    isa: str, dtype: torch.dtype, lr: float, distance: int
) -> None:
    """Each number less parts of numbers of its own size or smaller: with halves and quarters of its last
    place, ties are among the results."""
    numbers = all_halves(dtype)
    gradient = (numbers.double() * 2.0**-distance).to(dtype)
    exact = numbers.double() - lr * gradient.double()
    got = step(numbers.clone(), gradient, lr=lr)
    want = exact.float().to(dtype)
    is_nan = want.isnan()
    assert same_bits(got[~is_nan], want[~is_nan])
    assert got[is_nan].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", range(16))
def test_tensors_of_every_length_and_alignment(isa: str, dtype: torch.dtype, first: int) -> None:
    """The tensors' last weights are updated, and what lies before and behind them is not touched. Beginning
    with a whole vector, tensors have all lengths; elsewhere every other one, odd or even."""
    generator = torch.Generator().manual_seed(first)
    lengths = range(1, 65) if first == 0 else range(1 + first.bit_count() % 2, 65, 2)
    for length in lengths:
        # One row, rows of one weight, and rows of several: by turns.
        rows = (1, length, next((n for n in (2, 3, 5, 7) if length % n == 0), 1))[(first + length) % 3]
        values, gradients, buffers = (torch.randn(96, generator=generator).to(dtype) for _ in range(3))
        mask = pattern_mask("half", (rows, length // rows), generator)
        inside = slice(first, first + length)
        values[inside] *= mask.flatten()
        buffers[inside] *= mask.flatten()
        want = one_step(values, gradients, buffers, mask, inside, "reference")
        got = one_step(values, gradients, buffers, mask, inside, "cpu")
        for a, b in zip(got, want, strict=True):
            assert same_bits(a[:first], b[:first])
            assert same_bits(a[first + length :], b[first + length :])
            assert not a[inside][~mask.flatten()].any()
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(a[inside], b[inside], rtol=4 * eps, atol=4 * eps)


def one_step(
    values: Tensor, gradients: Tensor, buffers: Tensor, mask: Tensor, inside: slice, backend: str
) -> tuple[Tensor, Tensor]:
    """Copies of values and buffers, of which the slice has made a step."""
    storage, buffer_storage = values.clone(), buffers.clone()
    parameter = Parameter(storage[inside].view(mask.shape))
    parameter.grad = gradients[inside].view(mask.shape)
    optimizer = SparseOpt(
        [parameter], lr=0.1, momentum=0.9, weight_decay=0.1, masks={parameter: mask}, backend=backend
    )
    optimizer.state[parameter]["momentum_buffer"] = buffer_storage[inside].view(mask.shape)
    optimizer.step()
    return storage, buffer_storage


@pytest.mark.parametrize("columns", [1, 2, 3, 5, 9, 15, 16, 17, 27, 31, 32, 33, 48, 147])
def test_each_row_has_its_own_factor(isa: str, columns: int) -> None:
    """Row i has fan-in i % columns + 1 and nothing but its gradient: the step shows its factor."""
    rows = 67
    mask = torch.arange(columns) <= (torch.arange(rows) % columns)[:, None]
    p = Parameter(torch.zeros(rows, columns, dtype=torch.float64))
    p.grad = torch.ones_like(p)
    SparseOpt([p], lr=1.0, masks={p: mask}, backend="cpu").step()
    fan_in = mask.sum(1)
    factor = (fan_in.double() / (mask.sum().double() / rows)).sqrt()
    torch.testing.assert_close(-p.detach(), mask * factor[:, None])
