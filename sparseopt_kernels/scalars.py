"""What a step is given besides tensors: hyperparameters, AMP's scale and verdict, the limit of the norm.

As numbers, where the CPU knows them or a backend wants them; else as tensors that stay on the device, so
that no step waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .kernels.contract import Batch, Rule
from .neurons import arithmetic_dtype


def set_scalars(
    batch: Batch,
    groups: Sequence[dict[str, Any]],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    on_host: bool,
) -> None:
    """Give a batch its rules, and what GradScaler says.

    Args:
        batch: where they go.
        groups: the optimizer's parameter groups.
        grad_scale, found_inf: GradScaler's, or None.
        on_host: whether all of it is to be numbers; ``found_inf`` is None then.
    """
    gamma = 1.0
    if on_host and grad_scale is not None:
        gamma, grad_scale = 1.0 / float(grad_scale), None
    batch.grad_scale = None if grad_scale is None else _on(grad_scale, batch.device, torch.float32)
    batch.found_inf = None if found_inf is None else _on(found_inf, batch.device, torch.float32)
    batch.rules = [
        Rule(
            _learning_rate(group["lr"], batch, on_host),
            group["momentum"],
            group["dampening"],
            float(group["weight_decay"]),
            group["nesterov"],
            group["maximize"],
            group["correction"],
            group["ham_alpha"],
            group["ham_beta"],
            gamma,
        )
        for group in groups
    ]


def limit_norm(
    calls: Sequence[tuple[ModuleType, Batch]], limits: Sequence[float | None], on_host: bool
) -> None:
    """Put the gradient-norm coefficient of Appendix F into the rules of the groups that have a limit.

    Args:
        calls: all batches of the step, and the backend of each.
        limits: ``max_grad_norm`` of each group.
        on_host: whether the coefficient is to be a number.
    """
    squares = [backend.squared_norm(batch) for backend, batch in calls]
    if on_host:
        norm = math.sqrt(sum(float(square) for square in squares))
        for _, batch in calls:
            for rule, limit in zip(batch.rules, limits, strict=True):
                if limit is not None:
                    assert isinstance(rule.gamma, float)
                    rule.gamma /= max(norm * rule.gamma / limit, 1.0)
        return
    total = torch.zeros_like(squares[0])
    for square in squares:
        total += square.to(total.device, non_blocking=True)
    grad_scale = calls[0][1].grad_scale
    norm_on_device = total.sqrt() if grad_scale is None else total.sqrt() / grad_scale
    for group, limit in enumerate(limits):
        if limit is not None:
            coefficient = (limit / norm_on_device).clamp(max=1.0)
            for _, batch in calls:
                batch.rules[group].gamma = _on(coefficient, batch.device, arithmetic_dtype(batch.dtype))


def _learning_rate(lr: float | Tensor, batch: Batch, on_host: bool) -> float | Tensor:
    if not isinstance(lr, Tensor) or on_host or (lr.device.type == "cpu" != batch.device.type):
        return float(lr)
    return _on(lr, batch.device, arithmetic_dtype(batch.dtype))


def _on(scalar: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return scalar.detach().reshape(()).to(device, dtype, non_blocking=True)
