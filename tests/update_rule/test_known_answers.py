"""Steps worked out by hand, or by others."""

from __future__ import annotations

import math
from typing import Any

import torch
from backends import Backend
from side_by_side import same_bits
from torch.nn.parameter import Parameter

from sparseopt_kernels.correction import Correction
from sparseopt_kernels.optimizer import SparseOpt


def test_ham_known_answer(backend: Backend) -> None:
    """The first step of the HAM authors' wrapper around torch.optim.SGD, float64; the last weight reaches
    the clamp of the exponent."""
    weight = Parameter(torch.tensor([[0.5, -0.3], [0.0, 0.02]], dtype=torch.float64))
    weight.grad = torch.tensor([[0.01, 0.02], [-0.05, 1.0]], dtype=torch.float64)
    SparseOpt(
        [weight],
        lr=0.1,
        momentum=0.9,
        weight_decay=0.0005,
        ham_alpha=80.0,
        ham_beta=0.016,
        masks={weight: torch.ones(2, 2, dtype=torch.bool)},
        correction="none",
        backend=backend.name,
    ).step()
    known = [[0.459875589041, -0.353816121456], [0.00744719843321, -11.8732011414]]
    torch.testing.assert_close(
        weight.detach(), torch.tensor(known, dtype=torch.float64), rtol=1e-11, atol=1e-13
    )


def test_ham_leaves_biases_alone(backend: Backend) -> None:
    """HAM is for two or more dimensions: with it and without it a vector moves alike."""
    value, grad = torch.randn(9), torch.randn(9)
    moved = []
    for alpha in (0.0, 80.0):
        bias = Parameter(value.clone())
        bias.grad = grad.clone()
        SparseOpt([bias], lr=0.1, ham_alpha=alpha, ham_beta=0.5 * alpha, backend=backend.name).step()
        moved.append(bias.detach())
    assert same_bits(*moved)


def test_known_correction_by_hand(backend: Backend) -> None:
    """Fan-in 1, 2, 0, 5 of 5: mean 2, so c = sqrt(1/2), 1, 0, sqrt(5/2); lr 1 and p = 0 show it in p."""
    mask = torch.tensor(
        [[0, 0, 1, 0, 0], [1, 0, 0, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool
    )
    expected: dict[Correction, list[float]] = {
        "layer": [math.sqrt(0.5), 1.0, 0.0, math.sqrt(2.5)],
        "unnormalized": [math.sqrt(0.2), math.sqrt(0.4), 0.0, 1.0],
        "none": [1.0, 1.0, 0.0, 1.0],
    }
    for correction, factors in expected.items():
        weight = Parameter(torch.zeros(4, 5, dtype=torch.float64))
        weight.grad = -torch.ones(4, 5, dtype=torch.float64)
        SparseOpt([weight], lr=1.0, masks={weight: mask}, correction=correction, backend=backend.name).step()
        want = mask * torch.tensor(factors, dtype=torch.float64).unsqueeze(1)
        torch.testing.assert_close(weight.detach(), want, rtol=1e-15, atol=0.0)


def test_known_norm_by_hand(backend: Backend) -> None:
    """Corrected and masked, the gradients are (3, 0) and (0, 4): norm 5, limit 2, so all shrink by 0.4."""
    a, b = Parameter(torch.zeros(1, 2)), Parameter(torch.zeros(2, dtype=torch.float64))
    a.grad, b.grad = torch.tensor([[3.0, 100.0]]), torch.tensor([0.0, 4.0], dtype=torch.float64)
    groups: list[dict[str, Any]] = [{"params": [a], "max_grad_norm": 2.0}, {"params": [b]}]
    SparseOpt(groups, lr=1.0, masks={a: torch.tensor([[True, False]])}, backend=backend.name).step()
    torch.testing.assert_close(a.detach(), torch.tensor([[-1.2, 0.0]]))
    assert b.tolist() == [0.0, -4.0]  # its group sets no limit
