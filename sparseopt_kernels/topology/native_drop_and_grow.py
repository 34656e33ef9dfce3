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
from .drop_and_grow import Change, LayerTensors, Ranking, score_of
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
        self._contiguous = [
            LayerTensors(p.contiguous(), as_boolean(m).contiguous(), e.contiguous()) for p, m, e in layers
        ]
        pairs = zip(self._contiguous, neurons, strict=True)
        self._updates = native_library.DropAndGrow(
            [_masked_layer(layer, min_fan_in, own) for layer, own in pairs], torch.get_num_threads()
        )
        self.active = self._updates.active
        self.missing = self._updates.missing

    def rank(self, rankings: Sequence[Ranking]) -> bool:
        # Within a neuron all factors are equal: the inputs it lacks are those of the values.
        finite = self._rank(
            [(r.layer, r.values, r.at_most if r.factors is None else 0, r.at_most > 0) for r in rankings]
        )
        for own in rankings:
            # One by one: scores are as large as the parameter.
            if finite and own.factors is not None:
                self._rank([(own.layer, score_of(own), own.at_most, False)])
        return finite

    def _rank(self, asked: Sequence[tuple[int, Tensor, int, bool]]) -> bool:
        values = [own.contiguous() for _, own, _, _ in asked]
        scores = [
            native_library.Scores(
                layer=layer, dtype=DTYPE_NAMES[own.dtype], values=own.data_ptr(), at_most=at_most, fills=fills
            )
            for (layer, _, at_most, fills), own in zip(asked, values, strict=True)
        ]
        return self._updates.rank(scores, torch.get_num_threads())

    def ranks_are_masked(self) -> bool:
        return self._updates.sees_active and not self._updates.sees_inactive

    def ranks_are_zero(self) -> bool:
        return not (self._updates.sees_active or self._updates.sees_inactive)

    def update(self, changes: Sequence[Change]) -> list[LayerUpdate]:
        weights = (own.parameter for own in self._contiguous)
        scores = [
            weight if own.drop_score is None else own.drop_score.contiguous()
            for own, weight in zip(changes, weights, strict=True)
        ]
        native = [
            native_library.Change(
                drop=int(own.counts.drop),
                grow=int(own.counts.grow),
                dtype=DTYPE_NAMES[score.dtype],
                drop_scores=score.data_ptr(),
                seeds=None if own.generator is None else _seeds(own.generator, missing),
            )
            for own, score, missing in zip(changes, scores, self.missing, strict=True)
        ]
        self._count_writes(changes)
        return self._written(self._updates.update(native, torch.get_num_threads()))

    def _count_writes(self, changes: Sequence[Change]) -> None:
        """Raise the versions of what the library may write, before it does.

        Afterwards would be too late: an interrupt between the two would leave masks changed that nobody
        notices. The price is that a layer that then does not change is prepared anew in vain.
        """
        written: list[Tensor] = []
        for (counts, *_), layer, contiguous in zip(changes, self._layers, self._contiguous, strict=True):
            if counts.drops or counts.grows:
                written += [t for t, own in zip(layer, contiguous, strict=True) if own is t]
        if written:
            increment_version(written)

    def _written(self, numbers: list[list[int]]) -> list[LayerUpdate]:
        """Copy back what the library wrote to copies; PyTorch counts these writes."""
        updates = [LayerUpdate(*own) for own in numbers]
        for layer, contiguous, update in zip(self._layers, self._contiguous, updates, strict=True):
            if contiguous.explored is not layer.explored:
                layer.explored.copy_(contiguous.explored)
            for tensor, own in zip(layer[:2], contiguous[:2], strict=True):
                if update.changed and own is not tensor:
                    tensor.copy_(own)
        return updates


def _seeds(generator: torch.Generator, missing: int) -> tuple[int, int]:
    """Draw a seed for the inputs that neurons lack, if there are any, and one for all else that grows."""
    of_missing = draw_seed(generator) if missing else 0
    return of_missing, draw_seed(generator)


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
