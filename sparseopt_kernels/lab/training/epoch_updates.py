"""The updates of the masks in one epoch, in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ...topology.layer_update import LayerUpdate

_FEWEST = 20
"""Of fewer new weights, one neuron gets a large part by chance."""


class EpochUpdates(NamedTuple):
    """Counts over all mask updates of an epoch and all layers."""

    grown: int = 0
    """The number of weights that grew; as many were dropped."""
    died: int = 0
    """The number of times that a neuron lost its last active weight."""
    largest_share: float = 0.0
    """The largest part of a layer's growth that went to one neuron in one update, in [0, 1]. Layers that grew
    fewer than 20 weights in it do not count."""

    def with_update(self, layers: Mapping[str, LayerUpdate]) -> EpochUpdates:
        """Return the numbers with one more update, given by layer."""
        return EpochUpdates(
            self.grown + sum(layer.grown for layer in layers.values()),
            self.died + sum(layer.died for layer in layers.values()),
            max([self.largest_share, *(o.largest_share for o in layers.values() if o.grown >= _FEWEST)]),
        )
