"""Dropping and growing weights in all layers at once: the interface, and its implementation in PyTorch.

How many are chosen, and by which scores, is not decided here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..masks.registered_masks import as_boolean
from ..neurons import Neurons
from .hooks import Counts
from .layer_update import LayerUpdate, compare_masks
from .score_checks import are_finite, is_nonzero
from .selection import drop_smallest, fill_neurons, grow_largest, grow_random, missing_inputs, random_scores


class LayerTensors(NamedTuple):
    """A parameter, its mask, and which weights have been active at some time: of one shape.

    The mask is boolean, or of floating-point numbers that are 0 or 1.
    """

    parameter: Tensor
    mask: Tensor
    explored: Tensor


class Ranking(NamedTuple):
    """The scores by which weights of a layer grow, or a gradient that must be finite."""

    layer: int
    values: Tensor
    """Their magnitudes are the scores; if ``signed``, the values are."""
    at_most: int
    """The number of weights that may grow; 0: the values are only checked."""
    factors: Tensor | None = None
    """|values| is multiplied by them; not negative; None: it is not."""
    signed: bool = False


class Change(NamedTuple):
    """What happens to the mask of a layer: nothing, if both counts are 0."""

    counts: Counts
    drop_score: Tensor | None = None
    """Active weights of smallest score are dropped; None: of smallest magnitude."""
    generator: torch.Generator | None = None
    """Of the CPU: weights grow at random; None: by the scores of the layer's ``Ranking``."""


class DropAndGrow(Protocol):
    """An update of the masks of all layers. Nothing is written before ``update``."""

    active: list[int]
    """The number of active weights of each layer."""
    missing: list[int]
    """The number of inputs of each layer that its neurons have less than ``min_fan_in``."""

    def rank(self, rankings: Sequence[Ranking]) -> bool:
        """Set the scores by which weights grow. Return whether all of them are finite."""

    def ranks_are_masked(self) -> bool:
        """Return whether everything by which weights may grow is 0 at inactive weights, but not at active
        ones: most likely it was multiplied by the masks."""

    def ranks_are_zero(self) -> bool:
        """Return whether everything by which weights may grow is 0."""

    def update(self, changes: Sequence[Change]) -> list[LayerUpdate]:
        """Drop and grow weights of each layer. Return what happened to each mask.

        With ``min_fan_in``, fewer are dropped where neurons need them, and as many fewer grow. A layer that
        grows must grow at least ``missing``. Where a mask changes, it is written in place, weights that left
        it or are new in it are zeroed, and the new ones are explored. What was active before is explored in
        any case.
        """


class TorchDropAndGrow:
    """``DropAndGrow`` of any tensors, which can also count by neuron.

    Args:
        layers: the tensors that are updated.
        neurons: the dimension of each layer that counts its neurons.
        min_fan_in: the number of inputs that each neuron keeps.
    """

    def __init__(
        self, layers: Sequence[LayerTensors], neurons: Sequence[Neurons], min_fan_in: int = 0
    ) -> None:
        self.active = [int(layer.mask.count_nonzero()) for layer in layers]
        self._layers = layers
        self._min_fan_in = min_fan_in
        self._neurons = neurons
        self._masks_are_shared = len({id(layer.mask) for layer in layers}) < len(layers)
        self.missing = [0] * len(layers)
        if min_fan_in:
            pairs = zip(layers, self._neurons, strict=True)
            self.missing = [missing_inputs(as_boolean(x.mask), min_fan_in, n) for x, n in pairs]
        self._rankings: dict[int, Ranking] = {}

    def rank(self, rankings: Sequence[Ranking]) -> bool:
        self._rankings.update({ranking.layer: ranking for ranking in rankings})
        return all(are_finite(ranking.values) for ranking in rankings)

    def ranks_are_masked(self) -> bool:
        for ranking in self._rankings.values():  # most of the time the first one tells
            if ranking.at_most > 0:
                mask = as_boolean(self._layers[ranking.layer].mask)
                if is_nonzero(ranking.values, outside=mask):
                    return False
        return not self.ranks_are_zero()

    def ranks_are_zero(self) -> bool:
        return not any(is_nonzero(r.values) for r in self._rankings.values() if r.at_most > 0)

    def update(self, changes: Sequence[Change]) -> list[LayerUpdate]:
        return [self._change(index, *change) for index, change in enumerate(changes)]

    def _change(
        self, index: int, counts: Counts, drop_score: Tensor | None, generator: torch.Generator | None
    ) -> LayerUpdate:
        if not (counts.drops or counts.grows):
            return LayerUpdate()
        kept = self._kept(index, counts.drop, drop_score)
        return self._apply(index, self._grown(index, kept, counts, generator) if counts.grows else kept)

    def _kept(self, index: int, drop: int | Tensor, score: Tensor | None) -> Tensor:
        """Return a mask without so many of its weights, or without as many as no neuron needs."""
        layer = self._layers[index]
        mask = as_boolean(layer.mask)
        if self._masks_are_shared and not isinstance(drop, Tensor):
            # The first parameter of a mask has changed the number of its weights already.
            drop = max(0, drop - self.active[index] + int(mask.count_nonzero()))
        score = layer.parameter.abs() if score is None else score
        return drop_smallest(mask, score, drop, self._min_fan_in, self._neurons[index])

    def _grown(self, index: int, kept: Tensor, counts: Counts, generator: torch.Generator | None) -> Tensor:
        mask, neurons = as_boolean(self._layers[index].mask), self._neurons[index]
        drop, grow = counts
        if isinstance(drop, Tensor) or isinstance(grow, Tensor):
            return grow_largest(kept, mask, self._score(index, generator), grow, neurons)
        if self.missing[index]:
            # Within a neuron all factors are equal; where they are 0, the values still tell weights apart.
            score = self._score(index, generator, with_factors=False)
            kept = fill_neurons(kept, score, self._min_fan_in, neurons)
        if self._min_fan_in:
            # Among the kept are what neurons lacked, and what they need of what was to drop.
            grow = max(0, self.active[index] - drop + grow - int(kept.count_nonzero()))
        if generator is not None:
            return grow_random(kept, grow, generator)
        return grow_largest(kept, mask, self._score(index, None), grow)

    def _score(self, index: int, generator: torch.Generator | None, with_factors: bool = True) -> Tensor:
        if generator is not None:
            mask = self._layers[index].mask
            return random_scores(mask.shape, generator).to(mask.device)
        ranking = self._rankings[index]
        return score_of(ranking if with_factors else ranking._replace(factors=None))

    def _apply(self, index: int, grown: Tensor) -> LayerUpdate:
        parameter, written, explored = self._layers[index]
        mask = as_boolean(written)
        explored |= mask
        update = compare_masks(mask, grown, self._neurons[index])
        if update.changed:
            explored |= grown
            # What grew starts at 0 even if the caller never zeroed it; what regrew keeps its value.
            parameter.masked_fill_(mask ^ grown, 0)
            written.copy_(grown)
        return update


def score_of(ranking: Ranking) -> Tensor:
    """Return the score of each weight, of the type of the values or more precise."""
    if ranking.signed:
        return ranking.values
    magnitude = ranking.values.abs()
    if ranking.factors is None:
        return magnitude
    dtype = torch.promote_types(magnitude.dtype, torch.float32)
    return magnitude.to(dtype) * ranking.factors.to(dtype)
