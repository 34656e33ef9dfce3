"""The reference backend: the update rule in plain PyTorch, for any device, dtype and memory format.

It is the definition that the other backends are compared to, and is written to be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..correction import Factors
from ..masks.registered_masks import as_boolean
from ..neurons import arithmetic_dtype, fan_in
from .contract import Inputs, NormOver, ParamState, Rule, UnseenWrite


class Reference:
    def unavailable(self, device: torch.device) -> str | None:
        return None

    def host_scalars(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def supports(self, param: ParamState) -> bool:
        return True

    def fan_in(self, params: Sequence[ParamState]) -> Tensor:
        masks = [(param.mask, param.neurons) for param in params if param.mask is not None]
        return torch.cat([fan_in(mask, neurons).double() for mask, neurons in masks])

    def plan(self, params: Sequence[ParamState], factors: Sequence[Factors | None]) -> ReferencePlan:
        return ReferencePlan([_part(*pair) for pair in zip(params, factors, strict=True)])


class _Part(NamedTuple):
    """A parameter, and what a plan keeps for it."""

    param: ParamState
    c: Tensor | None
    """``c_i``, of a shape that broadcasts against the parameter; None: they are 1."""
    mask: Tensor | None
    """A copy of the mask, by which unseen writes are noticed."""


def _part(param: ParamState, factors: Factors | None) -> _Part:
    mask = None if param.given_mask is None else param.given_mask.clone()
    c = None if factors is None else param.neurons.broadcast(factors.c, param.parameter.shape)
    return _Part(param, c, mask)


class ReferencePlan:
    def __init__(self, parts: Sequence[_Part]) -> None:
        self._parts = parts

    def step(self, inputs: Inputs) -> None:
        for part, gradient in zip(self._parts, inputs.gradients, strict=True):
            rule = inputs.rules[part.param.rule]
            update(part.param, part.c, gradient, rule, inputs.grad_scale, inputs.found_inf)

    def squared_norm(self, inputs: Inputs, over: NormOver) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self._parts[0].param.parameter.device)
        for part, gradient in zip(self._parts, inputs.gradients, strict=True):
            total += corrected_gradient(part.param, part.c, gradient, torch.float64, over).square().sum()
        return total

    def unseen_writes(self, everything: bool) -> list[UnseenWrite]:
        parts = [part for part in self._parts if part.mask is not None and part.mask.device.type == "cpu"]
        return [
            UnseenWrite(part.param, to_mask=True)
            for part in parts
            if not torch.equal(part.mask, part.param.given_mask)  # type: ignore[arg-type]
        ]

    def native_table(self) -> None:
        return None


def update(
    param: ParamState,
    c: Tensor | None,
    gradient: Tensor,
    rule: Rule,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Apply the update rule to one parameter; nothing is written where ``found_inf`` is not 0."""
    dtype = arithmetic_dtype(param.parameter.dtype)
    p = param.parameter.to(dtype)
    gamma = -rule.gamma if rule.maximize else rule.gamma
    if grad_scale is not None:
        gamma = gamma / grad_scale.to(dtype)
    g = corrected_gradient(param, c, gradient, dtype) * gamma

    # As torch.optim.SGD: without weight decay, a weight of -inf is not multiplied by 0.
    u = d = g.add(p, alpha=rule.weight_decay) if rule.weight_decay != 0 else g
    mask = _mask(param)
    if param.momentum_buffer is not None:
        b = param.momentum_buffer.to(dtype).mul(rule.momentum).add(d, alpha=1.0 - rule.dampening)
        u = d.add(b, alpha=rule.momentum) if rule.nesterov else b
        _write(param.momentum_buffer, b, mask, found_inf)
    p = p.addcmul(u, -rule.lr) if isinstance(rule.lr, Tensor) else p.add(u, alpha=-rule.lr)
    if param.ham and (rule.ham_alpha or rule.ham_beta):
        exponent = -rule.lr * (rule.ham_alpha * p.sign() * g + rule.ham_beta)
        p = p * exponent.clamp(-5.0, 5.0).exp()
    _write(param.parameter, p, mask, found_inf)


def corrected_gradient(
    param: ParamState, c: Tensor | None, gradient: Tensor, dtype: torch.dtype, over: NormOver = "active"
) -> Tensor:
    """Return ``c_i * g`` in ``dtype``; 0 where the mask is False, unless all positions count."""
    g = gradient.to(dtype) if c is None else gradient.to(dtype) * c.to(dtype)
    mask = _mask(param)
    return g if mask is None or over == "dense" else torch.where(mask, g, 0.0)


def _write(to: Tensor, values: Tensor, mask: Tensor | None, found_inf: Tensor | None) -> None:
    if mask is not None:
        values = torch.where(mask, values, 0.0)
    if found_inf is not None:
        values = torch.where(found_inf != 0, to.to(values.dtype), values)
    to.copy_(values)


def _mask(param: ParamState) -> Tensor | None:
    """Return the mask as it is now: of a floating-point one, not the copy that was made before."""
    return param.mask if param.given_mask is None else as_boolean(param.given_mask)


REFERENCE = Reference()
