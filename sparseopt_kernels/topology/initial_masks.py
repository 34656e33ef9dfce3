"""The first mask of a layer: random, or of its largest weights."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..masks.layers import MaskableWeight
from ..neurons import Neurons, fan_in
from ..sharding import gathered
from .random_choice import choose_random, draw_seed, random_places
from .selection import fill_neurons, grow_largest

Init = Literal["random", "magnitude"]

_RANKS = 2**52  # as many as a float64 tells apart below 1


def initial_mask(
    weight: MaskableWeight, active: int, init: Init, min_fan_in: int, generator: torch.Generator
) -> Tensor:
    """Return a mask of exactly ``active`` weights of a layer, on its device; of a sharded one, all of it.

    A random mask is the same with and without ``min_fan_in`` where all neurons have that many weights anyway.
    Else it is as if all weights were ranked at random, those of that mask first: each neuron keeps its first
    ``min_fan_in``, and the first of all the others fill up the number.

    Args:
        weight: of which shape, device, neurons and (for ``"magnitude"``) values count; not written.
        active: how many weights, at least ``min_fan_in`` times the number of neurons.
        init: ``"random"``, all equally likely, or ``"magnitude"``, the largest ones.
        min_fan_in: how many weights each neuron has at least.
        generator: of the CPU, for ``"random"``.
    """
    parameter = weight.parameter.detach()
    if init == "magnitude":
        return keep_largest(gathered(parameter).abs(), active, weight.neurons, min_fan_in)
    mask = choose_random(parameter.numel(), active, draw_seed(generator)).view(parameter.shape)
    if min_fan_in > 0 and bool((fan_in(mask, weight.neurons) < min_fan_in).any()):
        ranks = random_places(draw_seed(generator), 0, mask.numel(), _RANKS).view(mask.shape)
        mask = keep_largest(mask + ranks.double() / _RANKS, active, weight.neurons, min_fan_in)
    return mask.to(parameter.device)


def keep_largest(score: Tensor, k: int, neurons: Neurons, min_fan_in: int) -> Tensor:
    """Return a mask of the ``min_fan_in`` largest scores of each neuron and the largest of all the others.

    Of equal scores the lower index (row-major) comes first, and NaN after every number.

    Args:
        score: of the weight's shape; not written.
        k: how many weights in all, at least ``min_fan_in`` times the number of neurons.
        neurons: where the neurons of the weight lie.
        min_fan_in: at most the number of weights of a neuron.
    """
    kept = torch.zeros(score.shape, dtype=torch.bool, device=score.device)
    if min_fan_in > 0 and score.numel() > 0:
        kept = fill_neurons(kept, score, min_fan_in, neurons)
    return grow_largest(kept, kept, score, k - int(kept.count_nonzero()))


def check_min_fan_in(weight: MaskableWeight, active: int, min_fan_in: int) -> None:
    """Raise ``ValueError``, naming the layer, unless each neuron can have ``min_fan_in`` active weights."""
    numel = weight.parameter.numel()
    if numel == 0:
        return
    groups, segments, per_group, length = weight.neurons.grid(weight.parameter.shape)
    if min_fan_in > segments * length:
        raise ValueError(
            f"min_fan_in is {min_fan_in}, but a neuron of {weight.name!r} has only {segments * length} "
            "weights: lower min_fan_in, or exclude the layer"
        )
    rows = groups * per_group
    if rows * min_fan_in > active:
        raise ValueError(
            f"min_fan_in is {min_fan_in}: the {rows} neurons of {weight.name!r} need {rows * min_fan_in} "
            f"active weights, but it gets {active} of its {numel}. Lower min_fan_in or the sparsity, give "
            "the layer a sparsity of its own (a mapping), or exclude it"
        )
