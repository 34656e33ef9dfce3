"""The layers of a mapping from parameter to mask: their names, their neurons, and checks of both."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from ..masks import Masks, check_mask
from ..neurons import Neurons


def check_masks(masks: Mapping[Parameter, Tensor]) -> list[str]:
    """Return the name of each layer, which a mapping without names numbers.

    Raises:
        TypeError: a key is not a parameter.
        ValueError: there is no mask, or one does not fit its parameter.
    """
    if not masks:
        raise ValueError("masks is empty, it must have at least one masked parameter")
    for key in masks:
        if not isinstance(key, Tensor):
            raise TypeError(
                f"masks has the key {key!r}, keys must be parameters: "
                "{model.get_parameter(name): mask}, or Masks(model)"
            )
    known = {p: n for n, p in masks.named().items()} if isinstance(masks, Masks) else {}
    names = [known.get(parameter, f"parameter {layer}") for layer, parameter in enumerate(masks)]
    for name, (parameter, mask) in zip(names, masks.items(), strict=True):
        check_mask_of_numbers(mask, parameter, name)
    return names


def neurons_in(masks: Mapping[Parameter, Tensor], parameter: Parameter) -> Neurons:
    """Return where the neurons of a masked parameter lie; dimension 0 where no model tells."""
    return masks.neurons(parameter) if isinstance(masks, Masks) else Neurons()


def as_boolean(mask: Tensor) -> Tensor:
    """Return a boolean mask itself, and a boolean copy of a floating-point one."""
    return mask if mask.dtype == torch.bool else mask != 0


def check_mask_of_numbers(mask: Tensor, parameter: Tensor, name: str) -> None:
    """Raise ``ValueError``, naming the parameter, unless ``mask`` is a mask for it: boolean, or of
    floating-point numbers that are all 0 or 1."""
    if not (isinstance(mask, Tensor) and mask.is_floating_point()):
        return check_mask(mask, parameter, name)
    check_mask(as_boolean(mask), parameter, name)
    if mask.device.type == "meta":
        return None
    others = int(((mask != 0) & (mask != 1)).count_nonzero())
    if others:
        raise ValueError(
            f"mask for {name!r} has dtype {mask.dtype} and {others} values that are neither 0 nor 1"
        )
    return None
