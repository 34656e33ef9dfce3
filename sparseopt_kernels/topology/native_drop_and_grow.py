"""``DropAndGrow`` by the native library: the same bits in few passes over memory, for tensors on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn.parameter import Parameter

from .. import native_library
from ..kernels.memory import DTYPE_NAMES
from ..masks.registered_masks import as_boolean
from ..neurons import Neurons
from .drop_and_grow import Count, LayerTensors, Ranking, score_of
from .layer_update import LayerUpdate
from .random_choice import draw_seed


def supports(layers: Sequence[LayerTensors]) -> bool:
    """Tell if there is a library, and it supports the tensors and gradients of all layers.

    A mask that two parameters share changes between their turns, and the library reads all masks first.
    """
    return (
        not native_library.MISSING
        and len({id(layer.mask) for layer in layers}) == len(layers)
        and all(_is_supported(layer) for layer in layers)
    )


def _is_supported(layer: LayerTensors) -> bool:
    parameter, mask, explored = layer
    values = [parameter] if parameter.grad is None else [parameter, parameter.grad]
    return (
        all(tensor.dtype in DTYPE_NAMES for tensor in values)
        and (mask.dtype == torch.bool or mask.dtype in DTYPE_NAMES)
        and explored.dtype == torch.bool
        and all(_has_memory(t) and t.shape == mask.shape for t in (*values, mask, explored))
        and mask.numel() < 2**32
    )


def supports_score(score: Tensor) -> bool:
    """Tell if the library can rank by such a tensor of scores, whose magnitudes it compares."""
    return score.dtype in DTYPE_NAMES and _has_memory(score)


def _has_memory(tensor: Tensor) -> bool:
    """Tell if its address says where its numbers are: not of a subclass (which may be distributed, say)."""
    return (
        type(tensor) in (Tensor, Parameter)
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and (tensor.data_ptr() != 0 or tensor.numel() == 0)
    )


class NativeDropAndGrow:
    """``DropAndGrow`` of tensors that ``supports`` accepts, with one count for each layer.

    Tensors that are not contiguous, and masks that are not boolean, are copied, and copied back. Scores must
    be such that ``supports_score`` accepts them, and signed ones must not be negative.

    Args: as of ``TorchDropAndGrow``.
    """

    def __init__(
        self, layers: Sequence[LayerTensors], neurons: Sequence[Neurons], min_fan_in: int = 0
    ) -> None:
        self._layers = layers
        self._contiguous = [_contiguous(layer) for layer in layers]
        pairs = zip(self._contiguous, neurons, strict=True)
        self._updates = native_library.DropAndGrow(
            [_masked_layer(layer, min_fan_in, own) for layer, own in pairs], torch.get_num_threads()
        )
        self.active = self._updates.active
        self.missing = self._updates.missing
        self._drop_scores: list[Tensor] = []  # the library has only their addresses

    def rank(self, rankings: Sequence[Ranking]) -> bool:
        plain = [r if r.factors is None else r._replace(at_most=0) for r in rankings]
        fills = [own.at_most > 0 for own in rankings]
        finite = self._rank([(r, r.values, own) for r, own in zip(plain, fills, strict=True)])
        for ranking in rankings:
            # One by one: scores are as large as the parameter.
            if finite and ranking.factors is not None:
                # Within a neuron all factors are equal: the inputs it lacks are those of the values.
                self._rank([(ranking, score_of(ranking), False)])
        return finite

    def _rank(self, rankings: Sequence[tuple[Ranking, Tensor, bool]]) -> bool:
        values = [values.contiguous() for _, values, _ in rankings]
        scores = [
            native_library.Scores(
                layer=ranking.layer,
                dtype=DTYPE_NAMES[own.dtype],
                values=own.data_ptr(),
                at_most=ranking.at_most,
                fills=fills,
            )
            for (ranking, _, fills), own in zip(rankings, values, strict=True)
        ]
        return self._updates.rank(scores, torch.get_num_threads())

    def drop_by(self, layer: int, score: Tensor) -> None:
        own = score.contiguous()
        self._drop_scores.append(own)
        dtype, values = DTYPE_NAMES[own.dtype], own.data_ptr()
        self._updates.drop_by(
            [native_library.Scores(layer=layer, dtype=dtype, values=values, at_most=0, fills=False)]
        )

    def ranks_are_masked(self) -> bool:
        return self._updates.scores_are_masked

    def grow_largest(self, drops: Sequence[Count], grows: Sequence[Count] | None = None) -> list[LayerUpdate]:
        dropped, grown = _numbers(drops), _numbers(drops if grows is None else grows)
        self._count_writes(dropped, grown)
        return self._written(self._updates.grow_largest(dropped, grown, torch.get_num_threads()))

    def grow_random(
        self,
        drops: Sequence[Count],
        generators: Sequence[torch.Generator],
        grows: Sequence[Count] | None = None,
    ) -> list[LayerUpdate]:
        dropped, grown = _numbers(drops), _numbers(drops if grows is None else grows)
        pairs = list(zip(self.missing, generators, strict=False))
        of_missing = [draw_seed(generator) if missing else 0 for missing, generator in pairs]
        seeds = [draw_seed(generator) for generator in generators]
        self._count_writes(dropped, grown)
        return self._written(
            self._updates.grow_random(dropped, grown, seeds, of_missing, torch.get_num_threads())
        )

    def drop(self, drops: Sequence[Count]) -> list[LayerUpdate]:
        dropped = _numbers(drops)
        self._count_writes(dropped, dropped)
        return self._written(self._updates.drop(dropped, torch.get_num_threads()))

    def _count_writes(self, drops: list[int], grows: list[int]) -> None:
        """Raise the versions of what the library may write, before it does.

        Afterwards would be too late: an interrupt between the two would leave masks changed that nobody
        notices. The price is that a layer that then does not change is prepared anew in vain.
        """
        written: list[Tensor] = []
        counts = zip(drops, grows, self._layers, self._contiguous, strict=False)
        for drop, grow, layer, contiguous in counts:
            if drop > 0 or grow > 0:
                written += [t for t, own in zip(layer, contiguous, strict=True) if own is t]
        if written:
            increment_version(written)

    def _written(self, changes: list[native_library.LayerUpdate]) -> list[LayerUpdate]:
        """Copy back what the library wrote to copies; PyTorch counts these writes."""
        updates = [LayerUpdate(c.dropped, c.grown, c.died, c.revived, c.most_grown) for c in changes]
        for layer, contiguous, update in zip(self._layers, self._contiguous, updates, strict=True):
            if contiguous.explored is not layer.explored:
                layer.explored.copy_(contiguous.explored)
            for tensor, own in zip(layer[:2], contiguous[:2], strict=True):
                if update.changed and own is not tensor:
                    tensor.copy_(own)
        return updates


def _numbers(counts: Sequence[Count]) -> list[int]:
    """Return the counts as numbers, which they all must be."""
    return [int(k) for k in counts]


def _contiguous(layer: LayerTensors) -> LayerTensors:
    """Return the tensors of a layer, or copies of them."""
    parameter, mask, explored = layer
    return LayerTensors(parameter.contiguous(), as_boolean(mask).contiguous(), explored.contiguous())


def _masked_layer(layer: LayerTensors, min_fan_in: int, neurons: Neurons) -> native_library.MaskedLayer:
    return native_library.MaskedLayer(
        dtype=DTYPE_NAMES[layer.parameter.dtype],
        weights=layer.parameter.data_ptr(),
        mask=layer.mask.data_ptr(),
        explored=layer.explored.data_ptr(),
        numel=layer.mask.numel(),
        min_fan_in=min_fan_in,
        grid=neurons.grid(layer.mask.shape),
    )
