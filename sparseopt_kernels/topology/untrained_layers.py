"""``UntrainedLayers``: finds the masked layers that nothing trains, although their masks are updated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..kernels.tensor_memory import versions_of
from ..sharding import is_sharded
from .hooks import Layer
from .layer_update import LayerUpdate


class UntrainedLayers:
    """What the layers were like after the last update."""

    def __init__(self) -> None:
        self._versions: dict[str, int] = {}
        self._grown: dict[str, int] = {}

    def remember(self, layers: Sequence[Layer], update: Mapping[str, LayerUpdate]) -> None:
        """Remember the layers after an update, and what it did to each."""
        self._versions = _versions(layers)
        self._grown = {name: of_layer.grown for name, of_layer in update.items()}

    def find(self, layers: Sequence[Layer]) -> list[str]:
        """Return the names of the layers that nothing has trained since the last update.

        A layer is not trained if PyTorch has counted no write to its weight, and all that grew is still 0.
        (Some writes are not counted, such as those of a CUDA graph.) Where nothing grew, or the layer is
        sharded, no layer may have a gradient instead. Layers that do not require a gradient do not count. On
        a GPU, this waits for the device if there was no write.
        """
        versions = _versions(layers)
        trainable = [layer for layer in layers if layer.parameter.requires_grad]
        unwritten = [layer for layer in trainable if versions[layer.name] == self._versions.get(layer.name)]
        unknown = [layer for layer in unwritten if not self._grown[layer.name] or is_sharded(layer.parameter)]
        untrained = [layer for layer in unwritten if layer not in unknown and self._is_grown_zero(layer)]
        if len(unknown) + len(untrained) == len(trainable) and all(x.gradient is None for x in trainable):
            untrained = trainable
        return [layer.name for layer in untrained]

    def _is_grown_zero(self, layer: Layer) -> bool:
        nonzero = int((layer.mask & (layer.weight != 0)).count_nonzero())
        return layer.active - nonzero >= self._grown[layer.name]


def _versions(layers: Sequence[Layer]) -> dict[str, int]:
    """Return the number of writes to the weight of each layer, as PyTorch counts them."""
    counts = versions_of(layer.weight for layer in layers)
    return dict(zip((layer.name for layer in layers), counts, strict=True))
