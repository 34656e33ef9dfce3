"""One update of the masks of all layers: what SET and RigL ask for, and PyTorch's way of doing it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from .mask_update import drop_smallest, grow_largest, grow_random


class Layer(NamedTuple):
    """A parameter, its mask, and which weights have been active at some time: of one shape."""

    parameter: Parameter
    mask: Tensor
    explored: Tensor


class Ranking(NamedTuple):
    """What the weights of a layer may be ranked by."""

    layer: int
    gradient: Tensor
    at_most: int
    """How many may grow; 0: the gradient is only looked at."""
    factors: Tensor | None = None
    """What |gradient| is multiplied by, not negative; None: nothing."""


class Updates(Protocol):
    """An update in the making. Nothing is written before weights grow."""

    active: list[int]
    """The number of active weights of each layer."""

    def rank(self, rankings: Sequence[Ranking]) -> bool:
        """Remember by what weights grow. Return whether all gradients are finite."""

    def grow_largest(self, ks: list[int]) -> list[bool]:
        """Drop ``ks[l]`` active weights of smallest magnitude in layer ``l``, grow as many of largest rank.

        Where the mask changes, it is written in place, weights that left it or are new in it are zeroed, and
        the new ones are explored. What was active before is explored in any case.

        Returns:
            Which masks changed. A layer whose ``k`` is 0 is left alone.
        """

    def grow_random(self, ks: list[int], generators: Sequence[torch.Generator]) -> list[bool]:
        """The same with random growth, by a generator of the CPU for each layer."""


class TorchUpdates:
    """``Updates`` of any tensors."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.active = [int(layer.mask.count_nonzero()) for layer in layers]
        self._layers = layers
        self._rankings: dict[int, Ranking] = {}

    def rank(self, rankings: Sequence[Ranking]) -> bool:
        self._rankings = {ranking.layer: ranking for ranking in rankings}
        return all(bool(ranking.gradient.isfinite().all()) for ranking in rankings)

    def grow_largest(self, ks: list[int]) -> list[bool]:
        return [k > 0 and self._grow_largest(layer, k) for layer, k in enumerate(ks)]

    def grow_random(self, ks: list[int], generators: Sequence[torch.Generator]) -> list[bool]:
        return [
            k > 0 and _apply(layer, grow_random(_kept(layer, k), k, generator))
            for layer, k, generator in zip(self._layers, ks, generators, strict=True)
        ]

    def _grow_largest(self, index: int, k: int) -> bool:
        layer = self._layers[index]
        score = score_of(self._rankings[index])
        return _apply(layer, grow_largest(_kept(layer, k), layer.mask, score, k))


def score_of(ranking: Ranking) -> Tensor:
    """What the weights of a layer are ranked by: not negative, of the gradient's type or more precise."""
    magnitude = ranking.gradient.abs()
    if ranking.factors is None:
        return magnitude
    dtype = torch.promote_types(magnitude.dtype, torch.float32)
    return magnitude.to(dtype) * ranking.factors.to(dtype)


def _kept(layer: Layer, k: int) -> Tensor:
    return drop_smallest(layer.mask, layer.parameter.abs(), k)


def _apply(layer: Layer, grown: Tensor) -> bool:
    parameter, mask, explored = layer
    explored |= mask
    changed = mask ^ grown
    if not changed.any():
        return False
    explored |= grown
    # What grew starts at 0 even if the caller never zeroed it; what regrew keeps its value.
    parameter.masked_fill_(changed, 0)
    mask.copy_(grown)
    return True
