"""The reference backend: the update rule in plain PyTorch, for any device, dtype and memory format.

It is the definition that the other backends are compared to, and is written to be read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..neurons import arithmetic_dtype, correction_factors
from .contract import Batch, Entry, Rule


def unavailable(device: torch.device) -> str | None:
    return None


def host_scalars(device: torch.device) -> bool:
    return device.type == "cpu"


def step(batch: Batch) -> None:
    for i in range(len(batch.entries)):
        update(batch, i)


def squared_norm(batch: Batch) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=batch.device)
    for i in range(len(batch.entries)):
        total += squared_norm_of(batch, i)
    return total


def squared_norm_of(batch: Batch, i: int) -> Tensor:
    entry = batch.entries[i]
    g = _corrected_gradient(entry, batch.grads[i], batch.rules[entry.group], torch.float64)
    return g.square().sum()


def update(batch: Batch, i: int) -> None:
    """The update rule for one entry of a batch."""
    entry, grad = batch.entries[i], batch.grads[i]
    rule = batch.rules[entry.group]
    dtype = arithmetic_dtype(entry.parameter.dtype)
    p = entry.parameter.to(dtype)
    gamma = -rule.gamma if rule.maximize else rule.gamma
    if batch.grad_scale is not None:
        gamma = gamma / batch.grad_scale.to(dtype)
    g = _corrected_gradient(entry, grad, rule, dtype) * gamma

    # As torch.optim.SGD: without weight decay, a weight of -inf is not multiplied by 0.
    u = d = g.add(p, alpha=rule.weight_decay) if rule.weight_decay != 0 else g
    new_buffer = None
    if entry.momentum_buffer is not None:
        fresh = _fresh(batch, i, rule.dampening)  # the buffer holds zeros on the first step
        b = _add_scaled(entry.momentum_buffer.to(dtype).mul(rule.momentum), d, fresh)
        u = d.add(b, alpha=rule.momentum) if rule.nesterov else b
        new_buffer = b
    p = _add_scaled(p, u, -rule.lr)
    if entry.ham and (rule.ham_alpha or rule.ham_beta):
        exponent = -rule.lr * (rule.ham_alpha * p.sign() * g + rule.ham_beta)
        p = p * exponent.clamp(-5.0, 5.0).exp()
    _write(entry.parameter, p, entry.mask, batch.found_inf)
    if new_buffer is not None:
        assert entry.momentum_buffer is not None
        _write(entry.momentum_buffer, new_buffer, entry.mask, batch.found_inf)


def _fresh(batch: Batch, i: int, dampening: float) -> float | Tensor:
    """What a new momentum buffer's gradient is multiplied by: 1 on the first step, else 1 - dampening."""
    if batch.flags is None:
        return 1.0 if batch.entries[i].first_step else 1.0 - dampening
    later = (batch.flags[batch.positions[i], 0] == 0).to(arithmetic_dtype(batch.dtype))
    return 1.0 - dampening * later


def _add_scaled(a: Tensor, b: Tensor, scale: float | Tensor) -> Tensor:
    """``a + scale * b``."""
    return a.addcmul(b, scale) if isinstance(scale, Tensor) else a.add(b, alpha=scale)


def _write(to: Tensor, values: Tensor, mask: Tensor | None, found_inf: Tensor | None) -> None:
    if mask is not None:
        values = torch.where(mask, values, 0.0)
    if found_inf is not None:
        values = torch.where(found_inf != 0, to.to(values.dtype), values)
    to.copy_(values)


def _corrected_gradient(entry: Entry, grad: Tensor, rule: Rule, dtype: torch.dtype) -> Tensor:
    """``c_i * g`` where the mask is True, 0 elsewhere, in ``dtype``."""
    if entry.mask is None:
        return grad.to(dtype)
    c = correction_factors(entry.mask, entry.neurons, rule.correction)
    return torch.where(entry.mask, grad.to(dtype) * c.to(dtype), 0.0)
