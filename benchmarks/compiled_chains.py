"""Contestants under ``torch.compile``; the others are in ``sparseopt_kernels/lab/bench/contestants.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseopt_kernels.lab.bench.contestants import (
    LR,
    MOMENTUM,
    WEIGHT_DECAY,
    Contestant,
    chain,
    correction_of,
)
from sparseopt_kernels.lab.bench.network import Network


def compiled_chain(network: Network) -> Contestant:
    """Return the eager chain, optimizer included, under ``torch.compile``."""
    step = torch.compile(chain(network, "foreach"))
    return Contestant(
        name="torch.compile of the chain", network=network, step=step, prepare=network.restore_gradients
    )


def compiled_function(network: Network) -> Contestant:
    """Return the chain as one function of tensors under ``torch.compile``, written to be fused well: without
    an optimizer, without writes to gradients, with weights and momentum masked where they are computed."""
    factors = dict(zip(network.masks, correction_of(network), strict=True))
    weights = [p.detach() for p in network.parameters]
    buffers = [torch.zeros_like(p) for p in weights]
    masks = [network.masks.get(p) for p in network.parameters]
    scales = [factors.get(p) for p in network.parameters]
    # All tensors are arguments, so that other masks of the same shapes need no recompilation.
    update = torch.compile(_update, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def step() -> None:
        gradients: list[Tensor] = [p.grad for p in network.parameters]  # type: ignore[misc]
        update(weights, gradients, buffers, masks, scales)

    return Contestant(name="torch.compile of one function", network=network, step=step)


def _update(
    weights: list[Tensor],
    gradients: list[Tensor],
    buffers: list[Tensor],
    masks: list[Tensor | None],
    scales: list[Tensor | None],
) -> None:
    for p, g, b, mask, scale in zip(weights, gradients, buffers, masks, scales, strict=True):
        d = (g if scale is None else g * scale) + WEIGHT_DECAY * p
        b_new = MOMENTUM * b + d
        p_new = p - LR * b_new
        b.copy_(b_new if mask is None else torch.where(mask, b_new, 0.0))
        p.copy_(p_new if mask is None else torch.where(mask, p_new, 0.0))
