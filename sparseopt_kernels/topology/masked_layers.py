"""The layers of a mapping from parameter to mask: their names, and a check that the masks fit."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn.parameter import Parameter

from ..masks.mapping import Masks
from ..masks.registered_masks import check_mask


def check_masks(masks: Mapping[Parameter, Tensor]) -> list[str]:
    """Return the name of each layer, which a mapping without names numbers.

    Raises:
        TypeError: a key is not a parameter.
        ValueError: there is no mask, or one does not fit its parameter.
    """
    if not isinstance(masks, Mapping):
        raise TypeError(
            f"masks is a {type(masks).__name__}, it must be a Masks or a mapping from parameter to mask"
        )
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
        check_mask(mask, parameter, name)
    return names
