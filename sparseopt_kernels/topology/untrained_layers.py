"""``UntrainedLayers``: finds the masked layers that nothing trains, although their masks are updated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.tensor_memory import versions_of
from .hooks import Layer


class UntrainedLayers:
    """The layers whose weights stay the same bits from one update to the next, and to the one after that.

    Layers that do not require a gradient are left out. PyTorch's count of writes alone does not tell: fused
    optimizers and CUDA graphs are not counted. So where it has not moved, the sum of the weights is compared
    as well.
    """

    def __init__(self) -> None:
        # By the index of the layer, after the last update.
        self._versions: dict[int, int] = {}
        self._sums: dict[int, Tensor] = {}
        self._suspects: set[int] = set()

    def find(self, layers: Sequence[Layer]) -> list[str]:
        """Return the names of those that are found before an update. On a GPU, it may wait for the device."""
        versions = _versions(_trainable(layers))
        self._suspects = {index for index, count in versions.items() if count == self._versions.get(index)}
        known = [layer for layer in layers if layer.index in self._suspects and layer.index in self._sums]
        return [layer.name for layer in known if torch.equal(self._sums[layer.index], _sum(layer))]

    def remember(self, layers: Sequence[Layer]) -> None:
        """Remember the layers after the update before which :meth:`find` was called."""
        self._versions = _versions(_trainable(layers))
        self._sums = {layer.index: _sum(layer) for layer in layers if layer.index in self._suspects}


def _trainable(layers: Sequence[Layer]) -> list[Layer]:
    """Leave out frozen layers, inference tensors, whose writes PyTorch does not count, and empty shards."""
    return [
        layer
        for layer in layers
        if layer.parameter.requires_grad and not layer.weight.is_inference() and layer.weight.numel() > 0
    ]


def _versions(layers: Sequence[Layer]) -> dict[int, int]:
    """Return the number of writes to each weight, as PyTorch counts them."""
    counts = versions_of(layer.weight for layer in layers)
    return dict(zip((layer.index for layer in layers), counts, strict=True))


def _sum(layer: Layer) -> Tensor:
    """Return a number that changes with the weights."""
    return layer.weight.detach().sum(dtype=torch.complex128 if layer.weight.is_complex() else torch.float64)
