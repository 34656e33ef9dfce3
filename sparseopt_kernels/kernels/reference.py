"""The reference backend: the update rule in plain PyTorch, for any device, dtype and memory format.

It is the definition that the other backends are compared to, and is written to be read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..masks.registered_masks import as_boolean
from ..neurons import arithmetic_dtype, correction_factors
from .contract import Inputs, NormOver, Rule, Tensors, UnseenWrite


class Reference:
    def unavailable(self, device: torch.device) -> str | None:
        return None

    def host_scalars(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def supports(self, tensors: Tensors) -> bool:
        return True

    def plan(self, tensors: Sequence[Tensors]) -> ReferencePlan:
        return ReferencePlan(tensors)


class ReferencePlan:
    def __init__(self, tensors: Sequence[Tensors]) -> None:
        self._tensors = tensors

    def step(self, inputs: Inputs) -> None:
        for tensors, gradient in zip(self._tensors, inputs.gradients, strict=True):
            update(tensors, gradient, inputs.rules[tensors.group], inputs.grad_scale, inputs.found_inf)

    def squared_norm(self, inputs: Inputs, over: NormOver) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self._tensors[0].parameter.device)
        for tensors, gradient in zip(self._tensors, inputs.gradients, strict=True):
            rule = inputs.rules[tensors.group]
            total += _corrected_gradient(tensors, gradient, rule, torch.float64, over).square().sum()
        return total

    def unseen_writes(self, everything: bool) -> list[UnseenWrite]:
        return []  # the mask itself is read at each step, and all weights are written


def update(
    tensors: Tensors, gradient: Tensor, rule: Rule, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """The update rule for one parameter; nothing is written where ``found_inf`` is not 0."""
    dtype = arithmetic_dtype(tensors.parameter.dtype)
    p = tensors.parameter.to(dtype)
    gamma = -rule.gamma if rule.maximize else rule.gamma
    if grad_scale is not None:
        gamma = gamma / grad_scale.to(dtype)
    g = _corrected_gradient(tensors, gradient, rule, dtype) * gamma

    # As torch.optim.SGD: without weight decay, a weight of -inf is not multiplied by 0.
    u = d = g.add(p, alpha=rule.weight_decay) if rule.weight_decay != 0 else g
    new_buffer = None
    if tensors.momentum_buffer is not None:
        b = tensors.momentum_buffer.to(dtype).mul(rule.momentum).add(d, alpha=1.0 - rule.dampening)
        u = d.add(b, alpha=rule.momentum) if rule.nesterov else b
        new_buffer = b
    p = p.addcmul(u, -rule.lr) if isinstance(rule.lr, Tensor) else p.add(u, alpha=-rule.lr)
    if tensors.ham and (rule.ham_alpha or rule.ham_beta):
        exponent = -rule.lr * (rule.ham_alpha * p.sign() * g + rule.ham_beta)
        p = p * exponent.clamp(-5.0, 5.0).exp()
    mask = _mask(tensors)
    _write(tensors.parameter, p, mask, found_inf)
    if new_buffer is not None:
        assert tensors.momentum_buffer is not None
        _write(tensors.momentum_buffer, new_buffer, mask, found_inf)


def _write(to: Tensor, values: Tensor, mask: Tensor | None, found_inf: Tensor | None) -> None:
    if mask is not None:
        values = torch.where(mask, values, 0.0)
    if found_inf is not None:
        values = torch.where(found_inf != 0, to.to(values.dtype), values)
    to.copy_(values)


def _corrected_gradient(
    tensors: Tensors, gradient: Tensor, rule: Rule, dtype: torch.dtype, over: NormOver = "active"
) -> Tensor:
    """``c_i * g`` in ``dtype``; 0 where the mask is False, unless all positions count."""
    mask = _mask(tensors)
    if mask is None:
        return gradient.to(dtype)
    c = correction_factors(mask, tensors.neurons, rule.correction)
    corrected = gradient.to(dtype) * c.to(dtype)
    return corrected if over == "dense" else torch.where(mask, corrected, 0.0)


def _mask(tensors: Tensors) -> Tensor | None:
    """Return the mask as it is now: of a floating-point one, not the copy that was made before."""
    return tensors.mask if tensors.given_mask is None else as_boolean(tensors.given_mask)


REFERENCE = Reference()
