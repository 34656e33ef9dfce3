"""The reference backend: the update rule in plain PyTorch, for any device, dtype and memory format.

It is the definition that the other backends are compared to, and is written to be read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..masks import correction_factors
from .contract import Batch, Entry, Rule


def unavailable(device_type: str) -> str | None:
    return None


def step(batch: Batch) -> None:
    for entry, grad in zip(batch.entries, batch.grads, strict=True):
        update(entry, grad, batch.rules[entry.group])


def squared_norm(batch: Batch) -> float:
    return sum(
        squared_norm_of(entry, grad, batch.rules[entry.group])
        for entry, grad in zip(batch.entries, batch.grads, strict=True)
    )


def squared_norm_of(entry: Entry, grad: Tensor, rule: Rule) -> float:
    return float(_corrected_gradient(entry, grad, rule, torch.float64).square().sum())


def update(entry: Entry, grad: Tensor, rule: Rule) -> None:
    dtype = torch.float64 if entry.parameter.dtype == torch.float64 else torch.float32
    p = entry.parameter.to(dtype)
    g = _corrected_gradient(entry, grad, rule, dtype) * (-rule.gamma if rule.maximize else rule.gamma)

    # As torch.optim.SGD: without weight decay, a weight of -inf is not multiplied by 0.
    u = d = g.add(p, alpha=rule.weight_decay) if rule.weight_decay != 0 else g
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


def _corrected_gradient(entry: Entry, grad: Tensor, rule: Rule, dtype: torch.dtype) -> Tensor:
    """``c_i * g`` where the mask is True, 0 elsewhere, in ``dtype``."""
    if entry.mask is None:
        return grad.to(dtype)
    c = correction_factors(entry.mask, entry.neurons, rule.correction)
    return torch.where(entry.mask, grad.to(dtype) * c.to(dtype), 0.0)


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else torch.where(mask, values, 0.0)
