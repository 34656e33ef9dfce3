"""Dropping and growing weights in all layers at once: the interface, and its implementation in PyTorch.

How many are chosen, and by which scores, is not decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from ..masks.registered_masks import as_boolean
from ..neurons import Neurons
from .layer_update import LayerUpdate, compare_masks
from .selection import (
    drop_smallest,
    drop_smallest_inputs,
    fill_neurons,
    grow_largest,
    grow_largest_inputs,
    grow_random,
    missing_inputs,
    random_scores,
)

Count: TypeAlias = int | Tensor
"""The number of weights of a layer; or that of each neuron, an int64 tensor of shape ``(neurons,)``."""


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


class DropAndGrow(Protocol):
    """An update of the masks of all layers. Nothing is written before one of the last three methods.

    These leave a layer alone whose counts are 0. Where a mask changes, it is written in place, weights that
    left it or are new in it are zeroed, and the new ones are explored. What was active before is explored in
    any case. They return what happened to each mask.
    """

    active: list[int]
    """The number of active weights of each layer."""
    missing: list[int]
    """The number of inputs of each layer that its neurons have less than ``min_fan_in``."""

    def rank(self, rankings: Sequence[Ranking]) -> bool:
        """Set the scores by which weights grow. Return whether all of them are finite."""

    def drop_by(self, layer: int, score: Tensor) -> None:
        """Set the score of the weights that are dropped, which is |weight| otherwise."""

    def ranks_are_masked(self) -> bool:
        """Return whether everything by which weights may grow is 0 at inactive weights, but not at active
        ones: most likely it was multiplied by the masks."""

    def grow_largest(self, drops: Sequence[Count], grows: Sequence[Count] | None = None) -> list[LayerUpdate]:
        """Drop active weights of smallest score in each layer, and grow those of largest score.

        With ``min_fan_in``, fewer are dropped where neurons need them, and as many fewer grow.

        Args:
            drops: the number of weights to drop in each layer.
            grows: the number to grow, with ``min_fan_in`` at least ``missing``; None for ``drops``.
        """

    def grow_random(
        self,
        drops: Sequence[Count],
        generators: Sequence[torch.Generator],
        grows: Sequence[Count] | None = None,
    ) -> list[LayerUpdate]:
        """Do the same with random growth, by a generator of the CPU for each layer."""

    def drop(self, drops: Sequence[Count]) -> list[LayerUpdate]:
        """Do the same without growth."""


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
        self._drop_scores: dict[int, Tensor] = {}

    def rank(self, rankings: Sequence[Ranking]) -> bool:
        self._rankings.update({ranking.layer: ranking for ranking in rankings})
        return all(bool(ranking.values.isfinite().all()) for ranking in rankings)

    def drop_by(self, layer: int, score: Tensor) -> None:
        self._drop_scores[layer] = score

    def ranks_are_masked(self) -> bool:
        rankings = [ranking for ranking in self._rankings.values() if ranking.at_most > 0]
        masks = [as_boolean(self._layers[ranking.layer].mask) for ranking in rankings]
        # Most of the time the first one tells.
        for ranking, mask in zip(rankings, masks, strict=True):
            if ranking.values.masked_fill(mask, 0).any():
                return False
        return any(bool(ranking.values.any()) for ranking in rankings)

    def grow_largest(self, drops: Sequence[Count], grows: Sequence[Count] | None = None) -> list[LayerUpdate]:
        return self._update_each(drops, drops if grows is None else grows, self._grow_largest)

    def grow_random(
        self,
        drops: Sequence[Count],
        generators: Sequence[torch.Generator],
        grows: Sequence[Count] | None = None,
    ) -> list[LayerUpdate]:
        def grow(index: int, drop: Count, count: Count) -> Tensor:
            return self._grow_random(index, drop, count, generators[index])

        return self._update_each(drops, drops if grows is None else grows, grow)

    def drop(self, drops: Sequence[Count]) -> list[LayerUpdate]:
        return self._update_each(drops, drops, lambda index, drop, _: self._kept(index, drop))

    def _update_each(
        self,
        drops: Sequence[Count],
        grows: Sequence[Count],
        choose: Callable[[int, Count, Count], Tensor],
    ) -> list[LayerUpdate]:
        updates = []
        for index, (drop, grow) in enumerate(zip(drops, grows, strict=True)):
            changes = any(bool(k.any()) if isinstance(k, Tensor) else k for k in (drop, grow))
            updates.append(self._apply(index, choose(index, drop, grow)) if changes else LayerUpdate())
        return updates

    def _grow_largest(self, index: int, drop: Count, grow: Count) -> Tensor:
        mask, ranking = as_boolean(self._layers[index].mask), self._rankings[index]
        kept = self._kept(index, drop)
        if isinstance(grow, Tensor):
            return grow_largest_inputs(kept, mask, score_of(ranking), grow, self._neurons[index])
        if self._min_fan_in:
            # Within a neuron all factors are equal; where they are 0, the values still tell weights apart.
            within = ranking.values if ranking.signed else ranking.values.abs()
            kept = fill_neurons(kept, within, self._min_fan_in, self._neurons[index])
        return grow_largest(kept, mask, score_of(ranking), self._left_to_grow(index, kept, drop, grow))

    def _grow_random(self, index: int, drop: Count, grow: Count, generator: torch.Generator) -> Tensor:
        mask, kept = as_boolean(self._layers[index].mask), self._kept(index, drop)
        if isinstance(grow, Tensor):
            score = random_scores(kept.shape, generator).to(kept.device)
            return grow_largest_inputs(kept, mask, score, grow, self._neurons[index])
        if self.missing[index]:
            score = random_scores(kept.shape, generator).to(kept.device)
            kept = fill_neurons(kept, score, self._min_fan_in, self._neurons[index])
        return grow_random(kept, self._left_to_grow(index, kept, drop, grow), generator)

    def _left_to_grow(self, index: int, kept: Tensor, drop: Count, grow: int) -> int:
        """Return how many weights grow beside those that neurons lacked, which are among the kept."""
        if not self._min_fan_in:
            return grow
        assert not isinstance(drop, Tensor)
        return max(0, self.active[index] - drop + grow - int(kept.count_nonzero()))

    def _kept(self, index: int, drop: Count) -> Tensor:
        """Return a mask without so many of its weights, or without as many as no neuron needs."""
        layer, neurons = self._layers[index], self._neurons[index]
        mask = as_boolean(layer.mask)
        score = self._drop_scores[index] if index in self._drop_scores else layer.parameter.abs()
        if isinstance(drop, Tensor):
            return drop_smallest_inputs(mask, score, drop, neurons)
        if self._masks_are_shared:
            # The first parameter of a mask has changed the number of its weights already.
            drop = max(0, drop - self.active[index] + int(mask.count_nonzero()))
        return drop_smallest(mask, score, drop, self._min_fan_in, neurons)

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
