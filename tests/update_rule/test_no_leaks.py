"""What must not leak, change, or depend on the machine."""

from __future__ import annotations

import math

import pytest
import torch
from backends import Backend
from rules import DTYPES, EVERYTHING
from side_by_side import SideBySide, Spec, pattern_mask, same_bits
from torch import Tensor
from torch.nn.parameter import Parameter

from sparseopt_kernels.kernels.contract import Inputs, NormOver
from sparseopt_kernels.kernels.cpu import CpuPlan
from sparseopt_kernels.optimizer import SparseOpt


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("pattern", ["half", "sparse99", "empty", "empty-rows"])
def test_non_finite_values_outside_the_mask_do_not_leak(
    backend: Backend, pattern: str, bad: float, dtype: torch.dtype
) -> None:
    """Gradients, former weights and loaded momentum outside the mask may be anything."""
    generator = torch.Generator().manual_seed(2)
    mask = pattern_mask(pattern, (9, 517), generator)
    weight = Parameter(torch.randn(9, 517, generator=generator).to(dtype))
    buffer = torch.randn(9, 517, generator=generator).to(dtype)
    with torch.no_grad():
        weight[~mask] = bad
    buffer[~mask] = bad
    optimizer = SparseOpt(
        [weight],
        lr=0.01,
        momentum=0.9,
        nesterov=True,
        weight_decay=0.1,
        ham_alpha=1.0,
        max_grad_norm=1.0,
        masks={weight: mask},
        backend=backend.name,
    )
    optimizer.state[weight]["momentum_buffer"] = buffer
    for _ in range(3):
        grad = torch.randn(9, 517, generator=generator).to(dtype)
        grad[~mask] = bad
        weight.grad = grad.clone()
        optimizer.step()
        assert same_bits(weight.grad, grad)
        for tensor in (weight, optimizer.state[weight]["momentum_buffer"]):
            assert torch.isfinite(tensor).all()
            assert not tensor[~mask].any()


@pytest.mark.parametrize("pattern", ["half", "sparse99"])
def test_non_finite_gradient_at_an_active_weight_stays_there(backend: Backend, pattern: str) -> None:
    """A kernel that works in blocks must not spread one NaN over its neighbours."""
    generator = torch.Generator().manual_seed(3)
    mask = pattern_mask(pattern, (5, 301), generator)
    weight = Parameter(torch.randn(5, 301, generator=generator))
    weight.grad = torch.randn(5, 301, generator=generator)
    hit = mask.nonzero()[3]
    weight.grad[tuple(hit)] = math.nan
    SparseOpt([weight], lr=0.1, momentum=0.9, masks={weight: mask}, backend=backend.name).step()
    assert weight.isnan().nonzero().tolist() == [hit.tolist()]


def test_inactive_memory_is_kept_at_zero_when_masks_move(backend: Backend) -> None:
    """A weight that is pruned and grown again starts at zero, with zero momentum."""
    weight = Parameter(torch.ones(2, 64))
    mask = torch.ones(2, 64, dtype=torch.bool)
    optimizer = SparseOpt([weight], lr=0.1, momentum=0.9, masks={weight: mask}, backend=backend.name)
    weight.grad = torch.ones(2, 64)
    optimizer.step()
    mask[0, 5:40] = False
    optimizer.step()
    assert not weight[0, 5:40].any()
    mask[0, 5:40] = True
    weight.grad = torch.zeros(2, 64)
    optimizer.step()
    assert not weight[0, 5:40].any()
    assert not optimizer.state[weight]["momentum_buffer"][0, 5:40].any()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_thread_count_changes_no_bit(
    backend: Backend, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """p, b and the gradient norm are the same bits for 1, 2, 3 and 8 threads."""
    if backend.name not in ("cpu", "reference"):
        pytest.skip("threads are the native backend's")
    norms: list[Tensor] = []
    squared_norm = CpuPlan.squared_norm

    def recorded(plan: CpuPlan, inputs: Inputs, over: NormOver) -> Tensor:
        norms.append(squared_norm(plan, inputs, over))
        return norms[-1]

    monkeypatch.setattr(CpuPlan, "squared_norm", recorded)
    results: list[list[Tensor]] = []
    limit = 1.0 if backend.name == "cpu" else None  # PyTorch's own sums depend on the number of threads
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(4)
        params, masks = [], {}
        for shape, pattern in [
            ((71, 1031), "half"),
            ((71, 1031), "sparse99"),
            ((1, 70_003), "sparse90"),
            ((40_001, 1), "half"),
            ((70_001,), None),
            ((13, 17), "half"),
        ]:
            p = Parameter(torch.randn(shape, generator=generator).to(dtype))
            params.append(p)
            if pattern is not None:
                masks[p] = pattern_mask(pattern, shape, generator)
        optimizer = SparseOpt(
            params,
            lr=0.1,
            momentum=0.9,
            weight_decay=0.01,
            max_grad_norm=limit,
            masks=masks,
            backend=backend.name,
        )
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            optimizer.step()
        results.append([*params, *(optimizer.state[p]["momentum_buffer"] for p in params)])
    calls = len(norms) // len(results)
    for i, other in enumerate(results[1:], start=1):
        assert norms[i * calls : (i + 1) * calls] == norms[:calls]
        for a, b in zip(results[0], other, strict=True):
            assert same_bits(a, b)


def test_a_step_repeated_from_the_same_state_gives_the_same_bits(backend: Backend) -> None:
    """Deterministic: no result depends on addresses or on what a former call has left behind."""

    def once() -> list[Tensor]:
        run = SideBySide(backend, [Spec((33, 129), "sparse90", torch.float32)], [EVERYTHING], seed=11)
        run.run()
        (p,) = run.params.values()
        return [p.detach(), run.optimizer.state[p]["momentum_buffer"]]

    for a, b in zip(once(), once(), strict=True):
        assert same_bits(a, b)
