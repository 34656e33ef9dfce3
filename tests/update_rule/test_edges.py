"""Numbers at the edges: rounding, subnormal numbers, infinities and NaN."""

from __future__ import annotations

import math

import pytest
import torch
from backends import INTERPRETED, Backend
from oracle import Hyper, flat
from rules import DTYPES, EVERYTHING, NESTEROV
from side_by_side import SideBySide, Spec, assert_rounds_every_number, pattern_mask
from torch.nn.parameter import Parameter

from sparseopt_kernels.optimizer import SparseOpt


@pytest.mark.parametrize("pattern", [None, "half", "sparse90"], ids=str)
@pytest.mark.parametrize("lr", [1.0, 0.3, 1e-3, 7.7, 3e4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_is_rounded_as_pytorch_does(
    backend: Backend, dtype: torch.dtype, lr: float, pattern: str | None
) -> None:
    """All 65536 bit patterns as gradients: subnormal numbers, ties, overflow, infinities and NaN."""
    if INTERPRETED and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter cuts bfloat16 off where a GPU rounds")
    assert_rounds_every_number(backend, dtype, lr, pattern)


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_subnormal_numbers_are_not_flushed(backend: Backend, dtype: torch.dtype, masked: bool) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    p = Parameter(torch.zeros(3, 37, dtype=dtype))
    p.grad = torch.full((3, 37), -tiny / 4, dtype=dtype)
    masks = {p: torch.ones(3, 37, dtype=torch.bool)} if masked else {}
    optimizer = SparseOpt([p], lr=1.0, momentum=0.5, masks=masks, backend=backend.name)
    optimizer.step()
    assert (p == tiny / 4).all()
    assert (optimizer.state[p]["momentum_buffer"] == -tiny / 4).all()


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ham_over_the_whole_range_of_its_exponent(backend: Backend, dtype: torch.dtype, masked: bool) -> None:
    """Exponents from far below -5 to far above 5, both signs of h, h = 0, and the clamp itself."""
    run = SideBySide(
        backend, [Spec((2, 4001), "half" if masked else None, dtype)], [Hyper(lr=1.0, ham_alpha=1.0)]
    )
    (p,) = run.params.values()
    grad = torch.linspace(-8.0, 8.0, 4001).repeat(2, 1).to(dtype)
    with torch.no_grad():  # h = p - g: 1 in one row, -1 in the other, 0 at one place
        p.copy_(grad.double() + torch.tensor([[1.0], [-1.0]]))
        p[0, 100] = grad[0, 100]
    (layer,) = run.oracle.layers().values()
    layer.p = flat(p)
    run.step({"layer0": grad})


def test_ham_of_nan_and_infinity_stays_in_its_place(backend: Backend) -> None:
    p = Parameter(torch.ones(1, 40))
    p.grad = torch.zeros(1, 40)
    p.grad[0, 3], p.grad[0, 20] = math.nan, math.inf
    SparseOpt([p], lr=0.1, ham_alpha=2.0, backend=backend.name).step()
    assert p.isnan().nonzero().tolist() == [[0, 3]]
    assert p[0, 20] == -math.inf
    assert (p[0, [0, 1, 2, 4, 19, 21, 39]] == 1.0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_non_finite_norm_stays_within_the_masks(backend: Backend, bad: float) -> None:
    """As clip_grad_norm_ has it: NaN spreads to all that share the norm, infinity to itself alone; but
    what lies outside a mask is 0 whatever happens."""
    p, q = Parameter(torch.ones(4, 9)), Parameter(torch.ones(4, 9))
    mask = pattern_mask("half", (4, 9), torch.Generator().manual_seed(0))
    p.grad, q.grad = torch.ones(4, 9), torch.ones(4, 9)
    at = tuple(mask.nonzero()[0])
    p.grad[at] = bad
    SparseOpt([p, q], lr=0.1, max_grad_norm=1.0, masks={p: mask}, backend=backend.name).step()
    assert not p[~mask].any()
    assert p[at].isnan()
    if math.isnan(bad):
        assert p[mask].isnan().all()
        assert q.isnan().all()
    else:
        assert (q == 1.0).all()


def test_many_small_parameters(backend: Backend) -> None:
    """Hundreds of tensors, more than threads, in one call; some with nothing in them."""
    patterns = [None, "half", "full", "empty", "single"]
    count = 100 if backend.is_slow else 300
    specs = [Spec((i % 5, 1 + 7 * i % 23), patterns[i % len(patterns)], torch.float32) for i in range(count)]
    run = SideBySide(backend, specs, [NESTEROV, EVERYTHING], seed=12, threads=3)
    for _ in range(2 if backend.is_slow else 4):
        run.step()
