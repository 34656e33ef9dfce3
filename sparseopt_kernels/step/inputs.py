"""The inputs of a step besides tensors: hyperparameters, AMP's scale and verdict, the limit of the norm.

As numbers, where the host knows them or a backend wants them; else as tensors that stay on the device, so
that no step waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.contract import Inputs, Rule
from ..neurons import arithmetic_dtype
from .amp import Amp
from .found import RuleSource
from .gradients import Gradients, regular_gradients
from .preparation import Batch, Prepared


def inputs_of(
    batch: Batch,
    prepared: Prepared,
    gradients: Gradients,
    groups: Sequence[dict[str, Any]],
    amp: Amp,
) -> Inputs:
    """Return the inputs of a batch at one step.

    Args:
        batch, prepared: the batch, and what it is of.
        gradients: those of all parameters.
        groups: the optimizer's parameter groups.
        amp: GradScaler's. A step that is skipped does not come here, if the host knows of it.
    """
    grad_scale, found_inf, gamma = amp.grad_scale, amp.found_inf, 1.0
    if prepared.on_host:
        gamma = 1.0 if grad_scale is None else 1.0 / float(grad_scale)
        grad_scale = found_inf = None
    rules = [_rule(source, groups[source.group], batch, gamma, prepared.on_host) for source in prepared.rules]
    tensors, addresses = regular_gradients(gradients, batch.positions, batch.params, batch.irregular)
    return Inputs(
        gradients=tensors,
        addresses=addresses,
        rules=rules,
        grad_scale=None if grad_scale is None else _on(grad_scale, batch.device, torch.float32),
        found_inf=None if found_inf is None else _on(found_inf, batch.device, torch.float32),
    )


def limit_norm(
    batches: Sequence[Batch],
    inputs: Sequence[Inputs],
    limits: Sequence[float | None],
    prepared: Prepared,
) -> list[Inputs]:
    """Return the inputs with the coefficient of Appendix F in the rules whose gradients are limited.

    Args:
        batches, inputs: all batches of the step, and the inputs of each.
        limits: ``max_grad_norm`` of the group of each rule.
        prepared: the step that they are of.
    """
    # Limits that are tensors are not checked: the step would wait for their device.
    for limit in limits:
        if isinstance(limit, (int, float)) and not limit > 0:
            raise ValueError(f"max_grad_norm is {limit!r}, it must be a number > 0, or None for no limit")
    limits = [None if isinstance(limit, float) and limit == math.inf else limit for limit in limits]
    over = prepared.norm_over
    squares = [batch.plan.squared_norm(own, over) for batch, own in zip(batches, inputs, strict=True)]
    if prepared.shards:
        squares = _over_ranks(batches, squares, prepared)
    if not inputs:  # other ranks may have some
        return []
    # One of the two has AMP's scale, the other one is 1.
    gamma, grad_scale = inputs[0].rules[0].gamma, inputs[0].grad_scale
    coefficients: list[Any]
    if prepared.on_host:
        norm = math.sqrt(sum(map(float, squares))) * float(gamma)
        coefficients = [None if limit is None else gamma / max(norm / limit, 1.0) for limit in limits]
    else:
        total = torch.zeros_like(squares[0])
        for square in squares:
            total += square.to(total.device, non_blocking=True)
        scaled = total.sqrt() if grad_scale is None else total.sqrt() / grad_scale
        coefficients = [None if limit is None else (limit / scaled).clamp(max=1.0) for limit in limits]
    return [
        own._replace(rules=[_limited(*pair, batch) for pair in zip(own.rules, coefficients, strict=True)])
        for batch, own in zip(batches, inputs, strict=True)
    ]


def _over_ranks(batches: Sequence[Batch], squares: Sequence[Tensor], prepared: Prepared) -> list[Tensor]:
    """Add up what ranks have of sharded gradients: one sum for each mesh."""
    found = [square for batch, square in zip(batches, squares, strict=True) if batch.shards is None]
    for ranks in prepared.shards:
        device = ranks.device() if prepared.on_host else torch.device(ranks.mesh.device_type)
        total = torch.zeros((), dtype=torch.float64, device=device)
        for batch, square in zip(batches, squares, strict=True):
            if batch.shards == ranks:
                total += square.to(device, torch.float64)
        found.append(ranks.sums(total))
    return found


def _limited(rule: Rule, gamma: float | Tensor | None, batch: Batch) -> Rule:
    if isinstance(gamma, Tensor):
        gamma = _on(gamma, batch.device, arithmetic_dtype(batch.dtype))
    return rule if gamma is None else rule._replace(gamma=gamma)


def _rule(source: RuleSource, group: dict[str, Any], batch: Batch, gamma: float, on_host: bool) -> Rule:
    lr = group["lr"]
    if isinstance(lr, Tensor):
        stays = not on_host and (lr.device.type != "cpu" or batch.device.type == "cpu")
        lr = _on(lr, batch.device, arithmetic_dtype(batch.dtype)) if stays else lr.item()
    return Rule(
        lr=lr if isinstance(lr, Tensor) else float(lr),
        momentum=float(group["momentum"]),
        dampening=0.0 if source.is_first_step else float(group["dampening"]),
        weight_decay=float(group["weight_decay"]),
        nesterov=group["nesterov"],
        maximize=group["maximize"],
        ham_alpha=float(group["ham_alpha"]),
        ham_beta=float(group["ham_beta"]),
        gamma=gamma,
    )


def _on(scalar: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return scalar.detach().reshape(()).to(device, dtype, non_blocking=True)
