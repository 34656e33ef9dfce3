"""``Masks``: the masks of a model as a mapping from parameter to mask, with their sparsity and fan-in.

Masks are made in ``topology.sparsify``, and found in ``registered_masks.py``. Data that a kernel derives from
a mask (packed bits, lists of active blocks) belongs to the kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from ..neurons import Neurons, fan_in
from ..sharding import check_not_flat, is_sharded, local_part, reshard, whole_counts, whole_rows
from ..user_warning import warn
from . import mask_table
from .registered_masks import (
    MaskedParameter,
    masked_parameters,
    masks_without_parameter,
    registered_masks,
    remembered_mask,
)


def check_model(model: object) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless ``model`` is a module whose masks can be found."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, it must be a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "model is a torch.jit.ScriptModule, in which masks are not found: use the module it was made from"
        )
    check_not_flat(model)


class Masks(Mapping[Parameter, Tensor]):
    """Mapping from each masked parameter of a model to its mask, in model order.

    A mask is a boolean buffer ``<name>_mask`` (True = active) beside the parameter ``<name>``, of its
    shape and on its device. ``Masks`` only refers to those buffers: it holds no copy, so
    ``model.to()``, ``load_state_dict`` and writes in place are all seen through it.

    Layers that ``torch.nn.utils.prune`` has pruned belong to it as well: there the parameter is
    ``weight_orig``, and ``weight_mask`` is a floating-point tensor of 0 and 1, which it stays.

    After ``fully_shard`` (FSDP2), the masks are sharded as their parameters are: each rank keeps the rows
    that it has. Masks that were made before stay valid. Numbers are those of the whole network then, and what
    returns them must be called on all ranks.

    ``print(masks)`` shows a table of all layers.

    Args:
        model: a module in which :func:`sparsify` (or the user) has registered masks: the trained model,
            its ``deepcopy``, or one that was unpickled.

    Raises:
        ValueError: the model has no mask, or a mask does not fit its parameter (shape, device, dtype, or
            values other than 0 and 1).

    Warns:
        UserWarning: a mask is left out, because its layer computes its weight (``weight_norm``, say).
    """

    _places: dict[Parameter, MaskedParameter]

    def __init__(self, model: nn.Module) -> None:
        check_model(model)
        reshard(model)  # while parameters are gathered, the model has others than its optimizer
        self._model = model
        self._places = registered_masks(masked_parameters(model))
        computed = list(masks_without_parameter(model))
        if computed:
            reason = (
                f"{computed[0]!r} has a mask, but its layer computes it in each forward pass (weight_norm "
                "does, say), and what is computed cannot be kept sparse: remove the parametrization first"
                + (f". So do {len(computed) - 1} more layers" if len(computed) > 1 else "")
            )
            if not self._places:
                raise ValueError(f"the model has no mask of a parameter: {reason}")
            warn(f"a mask is left out: {reason}")
        if not self._places:
            raise ValueError(
                "the model has no mask: call sparsify(model, sparsity=...) first, "
                "or register a boolean buffer weight_mask beside a weight"
            )

    def __getitem__(self, parameter: Parameter) -> Tensor:
        place = self._places.get(parameter) or self._present_places()[parameter]
        mask = place.mask()
        if mask is None:
            raise ValueError(f"the mask of {place.name!r} is gone from the model: make Masks(model) anew")
        return mask

    def __contains__(self, parameter: object) -> bool:
        return parameter in self._places or parameter in self._present_places()

    def __iter__(self) -> Iterator[Parameter]:
        for parameter, place in self._places.items():
            now = place.module._parameters.get(place.attribute)  # in each step: no call that is not needed
            if now is not parameter and is_sharded(now) and not is_sharded(parameter):
                self._places = registered_masks(self._places.values())
                break
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def tensors(self) -> list[Tensor]:
        """Return all masks in the order of iteration; faster than ``list(self.values())``."""
        tensors = [place.module._buffers.get(place.buffer) for place in self._places.values()]
        if any(tensor is None for tensor in tensors):
            return list(self.values())  # raises
        return cast("list[Tensor]", tensors)

    # Mapping compares items, and comparing tensors gives tensors.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def named(self) -> dict[str, Parameter]:
        """Return the masked parameters by their qualified name in the model."""
        return {self._places[parameter].name: parameter for parameter in self}

    def subset(self, parameters: Iterable[Tensor]) -> Masks:
        """Return the masks of some of the model's parameters, for a topology (SET, RigL, GMP) of their own.

        Args:
            parameters: parameters of the model. Those without a mask are passed over.

        Raises:
            TypeError: one of them is no parameter (a name, say).
            ValueError: one of them is not a parameter of the model.
        """
        if isinstance(parameters, Tensor):
            raise TypeError("subset takes an iterable of parameters, it was given one: use [parameter]")
        self._present_places()
        wanted, held = [], self._held()
        for parameter in parameters:
            if not isinstance(parameter, Tensor):
                raise TypeError(
                    f"subset takes parameters, it was given a {type(parameter).__name__}: "
                    "model.get_parameter(name) finds one by its name"
                )
            if parameter not in held:
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} is not in the model of these masks"
                )
            wanted.append(parameter)
        return self._only(wanted)

    def neurons(self, parameter: Parameter) -> Neurons:
        """Return the dimension of a masked parameter that counts its neurons."""
        place = self._places.get(parameter) or self._present_places()[parameter]
        return place.neurons()

    def fan_in(self, parameter: Parameter) -> Tensor:
        """Return the number of active weights of each neuron: int64, of shape ``(neurons,)``."""
        return whole_fan_in(self[parameter], self.neurons(parameter))

    def nnz(self) -> int:
        """Return the number of active weights in all masks."""
        return sum(active_weights(self))

    def sparsity(self) -> float:
        """Return the fraction of the masked parameters' weights that is inactive, in [0, 1]."""
        return 1.0 - self.nnz() / max(1, sum(mask.numel() for mask in self.values()))

    def dead_share(self) -> float:
        """Return the fraction of all neurons that have no active weight, in [0, 1]."""
        counts = [self.fan_in(parameter) for parameter in self]
        return sum(int((own == 0).sum()) for own in counts) / max(1, sum(own.numel() for own in counts))

    def summary(self) -> list[mask_table.LayerSummary]:
        """Return one record for each masked parameter: name, shape, active weights, sparsity, fan-in, dead
        neurons."""
        return mask_table.summary(self)

    def check_held(self) -> None:
        """Raise ``ValueError``, naming the layer, if the model has replaced a masked parameter or its layer
        since these masks were found."""
        modules = set(self._model.modules())
        for parameter, place in self._places.items():
            if place.module not in modules or not (
                place.parameter() is parameter or place.is_gathered(parameter)
            ):
                raise ValueError(
                    f"the model has no parameter {place.name!r} any more that masks was made with: its layer "
                    "was replaced, or its weight was. Make Masks(model) anew, then the optimizer, SET or RigL"
                )

    def holds_any(self, parameters: Iterable[Tensor]) -> bool:
        """Tell if the model holds one of these parameters, masked or not."""
        return not self._held().isdisjoint(parameters)

    def __repr__(self) -> str:
        return f"Masks({len(self)} parameters, {self.nnz()} active weights, sparsity {self.sparsity():.4f})"

    def __str__(self) -> str:
        return mask_table.table(self)

    def _held(self) -> set[Tensor]:
        return {*self._model.parameters(), *self._places}

    def _present_places(self) -> dict[Parameter, MaskedParameter]:
        """Return the places by their parameters of now, if ``fully_shard`` has put others there."""
        iter(self)
        return self._places

    def _only(self, parameters: Iterable[Tensor]) -> Masks:
        wanted, some = set(parameters), copy(self)
        some._places = {p: place for p, place in self._places.items() if p in wanted}
        return some


def whole_fan_in(mask: Tensor, neurons: Neurons) -> Tensor:
    """Return the fan-in of all neurons of a mask. If it is sharded, all ranks must call it."""
    return whole_rows(fan_in(local_part(mask), neurons), mask, neurons.dim == 0)


def active_weights(masks: Mapping[Parameter, Tensor]) -> list[int]:
    """Return the number of active weights of each mask. If masks are sharded, all ranks must call it."""
    tensors = [*masks.values()]
    return whole_counts([int(local_part(mask).count_nonzero()) for mask in tensors], tensors)


def masks_of(masks: Mapping[Parameter, Tensor], parameters: Iterable[Tensor]) -> Mapping[Parameter, Tensor]:
    """Return the masks of these parameters alone if ``masks`` is a ``Masks``, else the mapping itself."""
    return masks._only(parameters) if isinstance(masks, Masks) else masks


def neurons_in(masks: Mapping[Parameter, Tensor], parameter: Parameter) -> Neurons:
    """Return the dimension of a masked parameter that counts its neurons.

    If the mask is registered in a model, the layer decides, whatever mapping the mask comes in. Else it is
    dimension 0.
    """
    if isinstance(masks, Masks):
        return masks.neurons(parameter)
    place = remembered_mask(parameter)
    return place.neurons() if place is not None and place.mask() is masks[parameter] else Neurons()
