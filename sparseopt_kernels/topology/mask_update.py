"""Choosing the active weights of one layer: pure functions of masks, scores and a generator, in PyTorch.

They define what ``csrc/cpu/selection.cpp`` computes as well (``native_updates.py``).

Every choice is exact in number and free of chance where it is not asked for. Of equal scores the
active weight comes before the inactive one, and then the lower index (row-major, whatever the memory
format) before the higher: it is kept, or grown, first. NaN comes last, after every number.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .random_choice import add_random, choose_random, draw_seed


def drop_smallest(mask: Tensor, score: Tensor, k: int) -> Tensor:
    """The mask without its ``k`` active weights of smallest score.

    Only active weights are ranked: an inactive one never counts as dropped, even when all scores tie.

    Args:
        mask: boolean, of any shape, with at least ``k`` active weights; not written.
        score: of the mask's shape and device, |w| for SET and RigL.
        k: how many to drop.
    """
    return _largest(score, mask, int(mask.count_nonzero()) - k)


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
    return kept | _largest(score, ~kept, k, first=mask)


def grow_random(kept: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """``kept`` and ``k`` of the weights not kept, all equally likely.

    Args:
        kept: boolean, of any shape and on any device; not written.
        k: how many to grow, at most the number of weights not kept.
        generator: of the CPU. One number is drawn from it: every device grows the same weights.
    """
    seed = draw_seed(generator)
    taken = kept.flatten()
    free = taken.numel() - int(taken.count_nonzero())
    if 2 * free >= taken.numel() and 2 * k <= free:
        return add_random(taken, k, seed).view(kept.shape)
    chosen = choose_random(free, k, seed)
    return taken.masked_scatter(~taken, chosen.to(kept.device)).view(kept.shape)


def _largest(score: Tensor, candidates: Tensor, k: int, first: Tensor | None = None) -> Tensor:
    """Exactly ``k`` True at the largest scores among ``candidates``; of equal ones, ``first`` first."""
    if k == 0:
        return torch.zeros_like(candidates)
    # NaN compares with nothing, and would break the count. Flat: the order of indices is that of rows.
    score = score.flatten().nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    open_places = candidates.flatten()
    # topk alone does not say which of equal entries it takes.
    threshold = score[open_places].topk(k, sorted=False).values.min()
    chosen = (score > threshold).logical_and_(open_places)
    tied = (score == threshold).logical_and_(open_places)
    missing = k - int(chosen.count_nonzero())
    if first is not None:
        places = (tied & first.flatten()).nonzero().flatten()[:missing]
        chosen[places] = True
        tied[places] = False
        missing -= places.numel()
    if missing:
        chosen[tied.nonzero().flatten()[:missing]] = True
    return chosen.view(candidates.shape)
