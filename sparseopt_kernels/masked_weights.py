"""The masks of a model where they are stored: boolean ones beside a parameter, and those of PyTorch's prune.

For what is done to a model around its training. The optimizer and topologies read ``Masks``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter
from torch.nn.utils.prune import BasePruningMethod

from .layers import pruned_by_pytorch
from .mask_changes import zero_outside
from .masks import check_mask


class MaskedWeight(NamedTuple):
    """A parameter with the mask that its module has for it."""

    name: str
    """The name of the weight in the model once there is no mask: ``"0.weight"``, even if it is pruned."""
    module: nn.Module
    attribute: str
    """``"weight"`` for the buffer ``weight_mask``."""
    parameter: Parameter
    mask: Tensor
    pruned: bool
    """``torch.nn.utils.prune`` holds it: the parameter is ``weight_orig``, the mask has its dtype."""

    @property
    def mask_name(self) -> str:
        """The name of the mask in the model's state dict."""
        return f"{self.name}_mask"

    @property
    def parameter_name(self) -> str:
        """The name of the parameter in the model's state dict."""
        return f"{self.name}_orig" if self.pruned else self.name


def masked_weights(model: nn.Module) -> list[MaskedWeight]:
    """Return all masks of a model, in model order; of a weight that layers share, each layer's.

    Buffers ``<name>_mask`` that are neither boolean nor ``torch.nn.utils.prune``'s are foreign and left out.

    Raises:
        ValueError: the model has no mask, or one does not fit its parameter.
    """
    found = masked_weights_if_any(model)
    if not found:
        raise ValueError(f"the model ({type(model).__name__}) has no mask: sparsify(model, ...) makes masks")
    return found


def masked_weights_if_any(model: nn.Module) -> list[MaskedWeight]:
    """As :func:`masked_weights`; an empty list for a model without masks."""
    return [own for name, module in model.named_modules() for own in _of_module(name, module)]


def zero_outside_masks(weights: list[MaskedWeight]) -> None:
    """Zero, in place, the weights outside their masks.

    Raises:
        ValueError: a mask holds another number than 0 and 1; nothing has been written.
    """
    active = [as_boolean(weight.mask, weight.name) for weight in weights]
    with torch.no_grad():
        for weight, mask in zip(weights, active, strict=True):
            zero_outside(mask, [weight.parameter])


def as_boolean(mask: Tensor, name: str) -> Tensor:
    """Return the mask of the parameter ``name`` with dtype bool; itself, if it is boolean.

    Raises:
        ValueError: it holds another number than 0 and 1.
    """
    if mask.dtype == torch.bool:
        return mask
    active = mask != 0
    if not bool((mask == active).all()):
        raise ValueError(
            f"the mask of {name!r} must hold 0 and 1 only: averaging buffers, as "
            "AveragedModel(use_buffers=True) does, makes other numbers of them"
        )
    return active


def _of_module(module_name: str, module: nn.Module) -> list[MaskedWeight]:
    prefix = f"{module_name}." if module_name else ""
    found = []
    for attribute, parameter in module._parameters.items():
        mask = module._buffers.get(f"{attribute}_mask")
        if parameter is None or mask is None or mask.dtype != torch.bool:
            continue
        name = prefix + attribute
        check_mask(mask, parameter, name)
        found.append(MaskedWeight(name, module, attribute, parameter, mask, pruned=False))
    hooks = module._forward_pre_hooks.values()
    held = {hook._tensor_name for hook in hooks if isinstance(hook, BasePruningMethod)}
    for attribute in pruned_by_pytorch(module):
        parameter, mask = module._parameters[f"{attribute}_orig"], module._buffers[f"{attribute}_mask"]
        if attribute in held and parameter is not None and mask is not None:
            found.append(MaskedWeight(prefix + attribute, module, attribute, parameter, mask, pruned=True))
    return found
