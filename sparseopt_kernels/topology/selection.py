"""Choosing the active weights of one layer: pure functions of masks, scores and a generator, in PyTorch.

They define what ``csrc/cpu/selection.cpp`` computes as well (``native_drop_and_grow.py``).

Every choice is exact in number. Of equal scores the active weight comes before the inactive one, and then the
lower index (row-major, whatever the memory format) before the higher: it is kept, or grown, first. NaN comes
last, after every number.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..neurons import Neurons, fan_in
from .random_choice import add_random, choose_random, draw_seed, random_places

_DIM_0 = Neurons()


def drop_smallest(
    mask: Tensor, score: Tensor, k: int | Tensor, min_fan_in: int = 0, neurons: Neurons = _DIM_0
) -> Tensor:
    """Return the mask without its ``k`` active weights of smallest score.

    Only active weights are ranked: an inactive one never counts as dropped, even when all scores tie.
    The ``min_fan_in`` active weights of largest score of each neuron stay, or all of a neuron that has no
    more. Where so many stay that fewer than ``k`` are left, all of these are dropped.

    Args:
        mask: boolean, of any shape, with at least ``k`` active weights; not written.
        score: of the mask's shape and device, ``|w|`` for SET and RigL.
        k: the number of weights to drop; or of each neuron, int64 of shape ``(neurons,)``.
        min_fan_in: the number of inputs that each neuron keeps, unless ``k`` is given for each.
        neurons: the dimension of the mask that counts neurons.
    """
    if isinstance(k, Tensor):
        return largest_inputs(score, mask, fan_in(mask, neurons) - k, neurons)
    if min_fan_in == 0:
        return _largest(score, mask, int(mask.count_nonzero()) - k)
    staying = largest_inputs(score, mask, fan_in(mask, neurons).clamp_max(min_fan_in), neurons)
    others = mask & ~staying
    return staying | _largest(score, others, max(0, int(others.count_nonzero()) - k))


def missing_inputs(mask: Tensor, min_fan_in: int, neurons: Neurons = _DIM_0) -> int:
    """Return how many active weights the neurons lack that have fewer than ``min_fan_in``, all together."""
    return int((min_fan_in - fan_in(mask, neurons)).clamp_min(0).sum())


def fill_neurons(kept: Tensor, score: Tensor, min_fan_in: int, neurons: Neurons = _DIM_0) -> Tensor:
    """Return ``kept`` and, in each neuron that has fewer than ``min_fan_in`` weights of it, those it lacks.

    Args:
        kept: boolean, what :func:`drop_smallest` left; not written. In such a neuron it drops nothing.
        score: of the mask's shape and device: ``|gradient|`` for RigL, :func:`random_scores` for SET. The
            weights of largest score in the neuron are taken.
        min_fan_in: at most the number of weights of a neuron.
        neurons: the dimension of the mask that counts neurons.
    """
    missing = (min_fan_in - fan_in(kept, neurons)).clamp_min(0)
    return kept | largest_inputs(score, ~kept, missing, neurons)


def random_scores(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Return scores in which every order of weights is equally likely: int64, of ``shape``, on the CPU.

    One number is drawn from the generator; weight ``i`` gets number ``i`` of its sequence.
    """
    return random_places(draw_seed(generator), 0, shape.numel(), 2**62).view(shape)


def grow_largest(
    kept: Tensor, mask: Tensor, score: Tensor, k: int | Tensor, neurons: Neurons = _DIM_0
) -> Tensor:
    """Return ``kept`` and the ``k`` weights of largest score among those not kept.

    Args:
        kept: what :func:`drop_smallest` left of ``mask``; not written. At least ``k`` weights must be
            outside it.
        mask: the mask before the update. What was dropped from it may come back, and does so before an
            inactive weight of the same score.
        score: of the mask's shape and device, ``|gradient|`` for RigL.
        k: the number of weights to grow; or of each neuron, int64 of shape ``(neurons,)``.
        neurons: the dimension of the mask that counts neurons.
    """
    if isinstance(k, Tensor):
        return kept | largest_inputs(score, ~kept, k, neurons, first=mask)
    return kept | _largest(score, ~kept, k, first=mask)


def grow_random(kept: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Return ``kept`` and ``k`` of the weights not kept, all equally likely.

    Args:
        kept: boolean, of any shape and on any device; not written.
        k: the number of weights to grow, at most the number of those not kept.
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
    """Return exactly ``k`` True at the largest scores of ``candidates``; of equal ones, ``first`` first."""
    if k == 0:
        return torch.zeros_like(candidates)
    # Flat: the order of indices is that of rows.
    score = comparable(score).flatten()
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


def largest_inputs(
    score: Tensor, candidates: Tensor, counts: Tensor, neurons: Neurons, first: Tensor | None = None
) -> Tensor:
    """Return as many True in each neuron as ``counts`` says, at the largest scores among ``candidates``.

    Args:
        counts: int64, of shape ``(neurons,)``, each at most the number of candidates of that neuron.
        first: of equal scores, these come before the others.
    """
    rows, row_scores = _rows(candidates, neurons), _rows(comparable(score), neurons)
    # The sorts are stable: candidates by score, equal ones by `first` and then by index, and then the rest.
    keys = [row_scores] if first is None else [_rows(first, neurons).byte(), row_scores]
    if not bool(rows.all()):
        keys.append(rows.byte())
    order = keys[0].sort(dim=1, descending=True, stable=True).indices
    for key in keys[1:]:
        by_key = key.gather(1, order).sort(dim=1, descending=True, stable=True).indices
        order = order.gather(1, by_key)
    taken = torch.arange(rows.shape[1], device=rows.device) < counts.to(rows.device).unsqueeze(1)
    chosen = torch.zeros_like(rows).scatter_(1, order, taken)
    groups, segments, per_group, length = neurons.grid(candidates.shape)
    return chosen.view(groups, per_group, segments, length).transpose(1, 2).reshape(candidates.shape)


def _rows(tensor: Tensor, neurons: Neurons) -> Tensor:
    """Return a row for each neuron, whose weights are in the order of their indices."""
    groups, segments, per_group, length = neurons.grid(tensor.shape)
    rows = tensor.reshape(groups, segments, per_group, length).transpose(1, 2)
    return rows.reshape(groups * per_group, segments * length)


def comparable(score: Tensor) -> Tensor:
    """Return the score with NaN as -inf: NaN compares with nothing, and would break a count."""
    if not score.is_floating_point():
        return score
    return score.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
