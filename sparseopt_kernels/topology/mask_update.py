"""Choosing the active weights of one layer: pure functions of masks, scores and a generator.

Every choice is exact in number and free of chance where it is not asked for. Of equal scores the
active weight comes before the inactive one, and then the lower index (row-major, whatever the memory
format) before the higher: it is kept, or grown, first. NaN comes last, after every number.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..layers import Neurons
from ..masks import fan_in


def cosine_fraction(drop_fraction: float, step: int, stop_at: float) -> float:
    """``drop_fraction / 2 * (1 + cos(pi * step / stop_at))``, for ``0 <= step <= stop_at`` (RigL, Eq. 1)."""
    return drop_fraction / 2.0 * (1.0 + math.cos(math.pi * step / stop_at))


def drop_smallest(mask: Tensor, score: Tensor, k: int) -> Tensor:
    """The mask without its ``k`` active weights of smallest score.

    Only active weights are ranked: an inactive one never counts as dropped, even when all scores tie.

    Args:
        mask: boolean, of any shape, with at least ``k`` active weights; not written.
        score: of the mask's shape and device, |w| for SET and RigL.
        k: how many to drop.
    """
    kept = mask.clone()
    active_score = score[mask]
    kept[mask] = _largest(active_score, active_score.numel() - k)
    return kept


def grow_largest(kept: Tensor, mask: Tensor, score: Tensor, k: int) -> Tensor:
    """``kept`` and the ``k`` weights of largest score among those not kept.

    Args:
        kept: what :func:`drop_smallest` left of ``mask``; not written. At least ``k`` weights must be
            outside it.
        mask: the mask before the update. What was dropped from it may come back, and does so before an
            inactive weight of the same score.
        score: of the mask's shape and device, |gradient| for RigL.
        k: how many to grow.
    """
    free = ~kept
    grown = kept.clone()
    grown[free] = _largest(score[free], k, first=mask[free])
    return grown


def grow_random(kept: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """``kept`` and ``k`` of the weights not kept, all equally likely.

    Args:
        kept: boolean, of any shape and on any device; not written.
        k: how many to grow, at most the number of weights not kept.
        generator: of the CPU. The numbers are drawn there: every device grows the same weights.
    """
    free = ~kept
    order = torch.randperm(int(free.sum()), generator=generator)
    chosen = torch.zeros(order.numel(), dtype=torch.bool)
    chosen[order[:k]] = True
    grown = kept.clone()
    grown[free] = chosen.to(kept.device)
    return grown


def corrected_magnitude(gradient: Tensor, mask: Tensor, neurons: Neurons) -> Tensor:
    """``c_i * |gradient|``, ``c_i = sqrt(fan_in_i / mean fan-in)`` (Eq. 12 of the paper).

    Args:
        gradient: of the mask's shape.
        mask: with at least one active weight. A neuron with none has ``c_i = 0``.
        neurons: which dimension counts the neurons.

    Returns:
        Of the mask's shape, float64 for a float64 gradient and float32 for any other.
    """
    groups, segments, count, length = neurons.grid(mask.shape)
    magnitude = gradient.abs()
    magnitude = magnitude.to(torch.promote_types(magnitude.dtype, torch.float32))
    per_neuron = fan_in(mask, neurons)
    mean = int(per_neuron.sum()) / per_neuron.numel()
    factor = (per_neuron.to(magnitude.dtype) / mean).sqrt().view(groups, 1, count, 1)
    return (magnitude.reshape(groups, segments, count, length) * factor).reshape(mask.shape)


def _largest(score: Tensor, k: int, first: Tensor | None = None) -> Tensor:
    """Exactly ``k`` True at the largest entries of a vector; of equal ones, those in ``first`` first."""
    if k == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    # NaN compares with nothing, and would break the count.
    score = score.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    # topk alone does not say which of equal entries it takes.
    threshold = score.topk(k, sorted=False).values.min()
    chosen = score > threshold
    tied = (score == threshold).nonzero().flatten()
    if first is not None:
        tied = torch.cat([tied[first[tied]], tied[~first[tied]]])
    chosen[tied[: k - int(chosen.sum())]] = True
    return chosen
