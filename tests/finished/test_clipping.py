"""``clip_grad_norm_`` and masks: it counts the gradients of inactive weights, ``max_grad_norm=`` does not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import sparseopt_kernels as sk


def gradients_of_a_network(dead: bool) -> tuple[Any, sk.Masks]:
    """Linear layers behind batch normalisation at a sparsity of 0.9, with gradients."""
    torch.manual_seed(0)
    model: Any = nn.Sequential()
    for width in (64, 256, 256):
        model.extend([nn.Linear(width, 256), nn.BatchNorm1d(256), nn.ReLU()])
    model.append(nn.Linear(256, 10))
    masks = sk.sparsify(model, 0.9)
    if dead:
        with torch.no_grad():
            model[3].weight_mask[:8] = False
            model[3].weight[:8] = 0.0
            model[4].bias[:8] = 1.0  # ReLU lets them through
    labels = torch.randint(10, (128,))
    nn.functional.cross_entropy(model(torch.randn(128, 64)), labels).backward()
    return model, masks


def norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([t.double().norm() for t in tensors]).norm())


def active_norm(model: nn.Module, masks: sk.Masks) -> float:
    """Of the gradients that masked SGD applies."""
    grads = [p.grad * masks[p] if p in masks else p.grad for p in model.parameters() if p.grad is not None]
    return norm(grads)


def test_clip_grad_norm_counts_inactive_weights() -> None:
    model, masks = gradients_of_a_network(dead=False)
    ratio = float(nn.utils.clip_grad_norm_(model.parameters(), 1e9)) / active_norm(model, masks)
    assert 2 < ratio < 5


def test_with_dead_neurons_they_are_most_of_the_norm() -> None:
    """Batch normalisation divides the gradient of a constant by the root of its epsilon."""
    model, masks = gradients_of_a_network(dead=True)
    ratio = float(nn.utils.clip_grad_norm_(model.parameters(), 1e9)) / active_norm(model, masks)
    assert ratio > 10


def test_max_grad_norm_counts_active_weights_only() -> None:
    model, masks = gradients_of_a_network(dead=True)
    before = [p.detach().clone() for p in model.parameters()]
    limit = 0.5 * active_norm(model, masks)
    sk.SparseOpt(
        model.parameters(), lr=1.0, masks=masks, correction="none", max_grad_norm=limit, backend="reference"
    ).step()
    moved = norm([a - b.detach() for a, b in zip(before, model.parameters(), strict=True)])
    assert abs(moved - limit) < 1e-5 * limit
