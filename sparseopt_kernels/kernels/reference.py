"""The reference backend: the update rule in plain PyTorch, for any device, dtype and memory format.

It is the definition that the other backends are compared to, and is written to be read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..masks import correction_factors
from .contract import Entry, Rule


def unavailable(device_type: str) -> str | None:
    return None


def step(entries: list[Entry]) -> None:
    for entry in entries:
        _update(entry, entry.rule)


def squared_norm(entries: list[Entry]) -> float:
    return sum(float(corrected_gradient(e, torch.float64).abs().square().sum()) for e in entries)


def corrected_gradient(entry: Entry, dtype: torch.dtype) -> Tensor:
    """``c_i * g`` where the mask is True, 0 elsewhere, as a new tensor of ``dtype``."""
    grad = entry.grad.to_dense() if entry.grad.is_sparse else entry.grad
    if entry.mask is None:
        return grad.to(dtype)
    c = _per_weight(entry, entry.mask).to(dtype)
    return torch.where(entry.mask, grad.to(dtype) * c, 0.0)


def _update(entry: Entry, rule: Rule) -> None:
    dtype = torch.float64 if entry.parameter.dtype == torch.float64 else torch.float32
    p = entry.parameter.to(dtype)
    g = corrected_gradient(entry, dtype) * (-rule.gamma if rule.maximize else rule.gamma)

    u = d = g.add(p, alpha=rule.weight_decay)
    if entry.momentum_buffer is not None:
        if entry.first_step:
            b = d
        else:
            b = entry.momentum_buffer.to(dtype).mul(rule.momentum).add(d, alpha=1 - rule.dampening)
        u = d.add(b, alpha=rule.momentum) if rule.nesterov else b
        entry.momentum_buffer.copy_(_masked(b, entry.mask))
    p = p.add(u, alpha=-rule.lr)
    if entry.ham and (rule.ham_alpha or rule.ham_beta):
        exponent = -rule.lr * (rule.ham_alpha * p.sign() * g + rule.ham_beta)
        p = p * exponent.clamp(-5.0, 5.0).exp()
    entry.parameter.copy_(_masked(p, entry.mask))


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else torch.where(mask, values, 0.0)


def _per_weight(entry: Entry, mask: Tensor) -> Tensor:
    """``c_i`` in a shape that broadcasts against the parameter."""
    groups, segments, neurons, _ = entry.neurons.grid(mask.shape)
    c = correction_factors(mask, entry.neurons, entry.rule.correction)
    leading = mask.shape[: entry.neurons.dim + 1]
    c = c.view(groups, 1, neurons).expand(groups, segments, neurons).reshape(leading)
    return c.view(leading + (1,) * (mask.ndim - len(leading)))
