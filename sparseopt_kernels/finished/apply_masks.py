"""Averaged weights (EMA, SWA) under masks."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from ..masks.mapping import Masks
from ..masks.registered_masks import MaskedParameter, as_boolean, check_mask, masked_parameters
from ..sharding import is_sharded, local_part, sharded_like
from ..step.zero_outside import zero_outside, zero_outside_masks

_WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")


def apply_masks(model: nn.Module, masks: Masks | None = None) -> None:
    """Zero the weights of a model outside its own masks, or outside those of the model that it averages.

    An average over changing masks has a weight wherever one of them was active. The average of the masks
    themselves is of no use either: ``AveragedModel(use_buffers=True)`` with an exponential average makes
    their union. ``apply_masks(averaged, masks)`` zeroes the weights outside ``masks``, and copies ``masks``
    into the mask buffers that the averaged model has.

    Args:
        model: written in place: an ``AveragedModel``, or any copy of a masked model.
        masks: a ``Masks`` of the trained model. Parameters are matched by name; leading ``module.`` and
            ``_orig_mod.`` (of ``DistributedDataParallel``, ``AveragedModel``, ``torch.compile``) are ignored.
            Default: the masks in ``model``.

    Raises:
        ValueError: ``model`` has no mask and ``masks`` is not given; a mask of either has no counterpart in
            the other; or it does not fit. Nothing has been written then.
        TypeError: ``masks`` is no ``Masks``: a dict has no names.
    """
    if masks is None:
        zero_outside_masks(Masks(model))
        return
    if not isinstance(masks, Masks):
        raise TypeError(f"masks is a {type(masks).__name__}, it must be a Masks, whose masks have names")
    own = masked_parameters(model)
    found = _matched(model, masks, own)
    with torch.no_grad():
        for place in own:
            parameter, mask = place.both()
            local_part(mask).copy_(local_part(found[parameter]))
        for parameter, mask in found.items():
            zero_outside(as_boolean(local_part(mask)), [local_part(parameter)])


def _matched(model: nn.Module, masks: Masks, own: list[MaskedParameter]) -> dict[Parameter, Tensor]:
    """Return the masks by the parameters of ``model``: boolean, each on its parameter's device.

    Raises:
        ValueError: see :func:`apply_masks`.
    """
    parameters = {_bare(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    found = {}
    for name, parameter in masks.named().items():
        mask = masks[parameter]
        check_mask(mask, parameter, name)
        target = parameters.get(_bare(name))
        if target is None:
            raise ValueError(f"masks has a mask for {name!r}, and the model has no parameter of that name")
        if target.shape != mask.shape:
            raise ValueError(
                f"masks has a mask of shape {tuple(mask.shape)} for {name!r}, whose shape in the model is "
                f"{tuple(target.shape)}"
            )
        mask = as_boolean(mask) if not is_sharded(mask) else mask
        found[target] = sharded_like(mask.to(target.device), target)
        check_mask(found[target], target, name)
    for place in own:
        parameter, mask = place.both()
        if parameter not in found:
            raise ValueError(f"the model has a mask for {place.name!r}, and masks has none")
        if mask.shape != parameter.shape:
            check_mask(mask, parameter, place.name)  # raises
    return found


def _bare(name: str) -> str:
    return _WRAPPERS.sub("", name)
