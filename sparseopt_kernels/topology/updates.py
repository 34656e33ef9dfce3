"""One update of the masks of all layers: what SET, RigL and GMP ask for, and PyTorch's way of doing it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from ..masks.registered_masks import as_boolean
from ..neurons import Neurons
from .layer_update import LayerUpdate, compare_masks
from .mask_update import drop_smallest, fill_neurons, grow_largest, grow_random, missing_inputs, random_scores


class Layer(NamedTuple):
    """A parameter, its mask, and which weights have been active at some time: of one shape.

    The mask is boolean, or of floating-point numbers that are 0 or 1.
    """

    parameter: Parameter
    mask: Tensor
    explored: Tensor


class Ranking(NamedTuple):
    """A gradient that the weights of a layer may be ranked by."""

    layer: int
    gradient: Tensor
    at_most: int
    """The number of weights that may grow; 0: the gradient is only looked at."""
    factors: Tensor | None = None
    """|gradient| is multiplied by them; not negative; None: it is not."""


class Updates(Protocol):
    """An update in the making. Nothing is written before weights grow."""

    active: list[int]
    """The number of active weights of each layer."""
    missing: list[int]
    """The number of inputs of each layer that its neurons have less than ``min_fan_in``."""

    def rank(self, rankings: Sequence[Ranking]) -> bool:
        """Remember by what weights grow. Return whether all gradients are finite."""

    def ranks_are_masked(self) -> bool:
        """Return whether everything by which weights may grow is 0 at inactive weights, but not at active
        ones: most likely it was multiplied by the masks."""

    def grow_largest(self, ks: list[int]) -> list[LayerUpdate]:
        """Drop ``ks[l]`` active weights of smallest magnitude in layer ``l``, grow as many of largest rank.

        With ``min_fan_in``, ``ks[l]`` is 0 or at least ``missing[l]``, and fewer are dropped and grown where
        neurons need the others. Where the mask changes, it is written in place, weights that left it or are
        new in it are zeroed, and the new ones are explored. What was active before is explored in any case.

        Returns:
            What happened to each mask. A layer whose ``k`` is 0 is left alone.
        """

    def grow_random(self, ks: list[int], generators: Sequence[torch.Generator]) -> list[LayerUpdate]:
        """The same with random growth, by a generator of the CPU for each layer."""

    def drop(self, ks: list[int]) -> list[LayerUpdate]:
        """The same without growth."""


class TorchUpdates:
    """``Updates`` of any tensors.

    Args:
        layers: what is updated.
        neurons: where those of each layer lie.
        min_fan_in: how many inputs each neuron keeps.
    """

    def __init__(self, layers: Sequence[Layer], neurons: Sequence[Neurons], min_fan_in: int = 0) -> None:
        self.active = [int(layer.mask.count_nonzero()) for layer in layers]
        self._layers = layers
        self._min_fan_in = min_fan_in
        self._neurons = neurons
        self.missing = [0] * len(layers)
        if min_fan_in:
            pairs = zip(layers, self._neurons, strict=True)
            self.missing = [missing_inputs(as_boolean(x.mask), min_fan_in, n) for x, n in pairs]
        self._rankings: dict[int, Ranking] = {}

    def rank(self, rankings: Sequence[Ranking]) -> bool:
        self._rankings = {ranking.layer: ranking for ranking in rankings}
        return all(bool(ranking.gradient.isfinite().all()) for ranking in rankings)

    def ranks_are_masked(self) -> bool:
        rankings = [ranking for ranking in self._rankings.values() if ranking.at_most > 0]
        masks = [as_boolean(self._layers[ranking.layer].mask) for ranking in rankings]
        # Most of the time the first one tells.
        for ranking, mask in zip(rankings, masks, strict=True):
            if ranking.gradient.masked_fill(mask, 0).any():
                return False
        return any(bool(ranking.gradient.any()) for ranking in rankings)

    def grow_largest(self, ks: list[int]) -> list[LayerUpdate]:
        return [self._grow_largest(layer, k) if k else LayerUpdate() for layer, k in enumerate(ks)]

    def grow_random(self, ks: list[int], generators: Sequence[torch.Generator]) -> list[LayerUpdate]:
        return [
            self._grow_random(layer, k, generator) if k else LayerUpdate()
            for layer, (k, generator) in enumerate(zip(ks, generators, strict=True))
        ]

    def drop(self, ks: list[int]) -> list[LayerUpdate]:
        return [self._drop(layer, k) if k else LayerUpdate() for layer, k in enumerate(ks)]

    def _grow_largest(self, index: int, k: int) -> LayerUpdate:
        layer, ranking = self._layers[index], self._rankings[index]
        kept = self._kept(index, k)
        if self._min_fan_in:
            # Within a neuron all factors are equal; where they are 0, the gradient still tells weights apart.
            kept = fill_neurons(kept, ranking.gradient.abs(), self._min_fan_in, self._neurons[index])
            k = self.active[index] - int(kept.count_nonzero())
        return self._apply(index, grow_largest(kept, as_boolean(layer.mask), score_of(ranking), k))

    def _grow_random(self, index: int, k: int, generator: torch.Generator) -> LayerUpdate:
        kept = self._kept(index, k)
        if self.missing[index]:
            score = random_scores(kept.shape, generator).to(kept.device)
            kept = fill_neurons(kept, score, self._min_fan_in, self._neurons[index])
        if self._min_fan_in:
            k = self.active[index] - int(kept.count_nonzero())
        return self._apply(index, grow_random(kept, k, generator))

    def _drop(self, index: int, k: int) -> LayerUpdate:
        layer = self._layers[index]
        # A mask may have two parameters: then the first has pruned it already.
        k -= self.active[index] - int(layer.mask.count_nonzero())
        return self._apply(index, self._kept(index, max(0, k)))

    def _kept(self, index: int, k: int) -> Tensor:
        """Return a mask without ``k`` of its weights, or without as many as no neuron needs."""
        layer = self._layers[index]
        mask, score = as_boolean(layer.mask), layer.parameter.abs()
        return drop_smallest(mask, score, k, self._min_fan_in, self._neurons[index])

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
    """Return the score of each weight: not negative, of the gradient's type or more precise."""
    magnitude = ranking.gradient.abs()
    if ranking.factors is None:
        return magnitude
    dtype = torch.promote_types(magnitude.dtype, torch.float32)
    return magnitude.to(dtype) * ranking.factors.to(dtype)
