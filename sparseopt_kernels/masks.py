"""Boolean masks that live in the model: finding them again, asking about them, checking them.

They are made in ``topology.sparsify``. What a kernel derives from a mask (packed bits, lists of active
blocks) is the kernel's business.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from .layers import neurons_of, pruned_by_pytorch
from .neurons import Neurons, fan_in
from .user_warning import warn


class Masks(Mapping[Parameter, Tensor]):
    """The masks registered in a model, by parameter, in model order.

    A mask is a boolean buffer ``<name>_mask`` (True = active) beside the parameter ``<name>``, of its
    shape and on its device. ``Masks`` only refers to those buffers: it holds no copy, so
    ``model.to()``, ``load_state_dict`` and writes in place are all seen through it.

    The masks of ``torch.nn.utils.prune`` are of another kind and are left out. A warning says how to keep
    them, or an error where the model has no others.

    Args:
        model: a module in which :func:`sparsify` (or the user) has registered masks: the trained model,
            its ``deepcopy``, or one that was unpickled.

    Raises:
        ValueError: the model has no mask, or a mask's dtype is not bool or its shape not the parameter's.
    """

    def __init__(self, model: nn.Module) -> None:
        self._places = _places(model)
        advice = _advice_on_pruned(model)
        if not self._places:
            raise ValueError(
                advice
                or "the model has no mask: call sparsify(model, sparsity=...) first, "
                "or register a boolean buffer weight_mask beside a weight"
            )
        if advice is not None:
            warn(f"a mask is left out: {advice}")

    def __getitem__(self, parameter: Parameter) -> Tensor:
        return _buffer(*self._places[parameter])

    def __iter__(self) -> Iterator[Parameter]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def tensors(self) -> list[Tensor]:
        """All masks, in the order of iteration: ``list(self.values())``, sooner."""
        tensors = [module._buffers.get(buffer) for _, module, buffer in self._places.values()]
        if any(tensor is None for tensor in tensors):
            return list(self.values())  # raises
        return cast("list[Tensor]", tensors)

    # Mapping compares items, and comparing tensors gives tensors.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def named(self) -> dict[str, Parameter]:
        """The masked parameters by their qualified name in the model."""
        return {name: parameter for parameter, (name, _, _) in self._places.items()}

    def neurons(self, parameter: Parameter) -> Neurons:
        """Which dimension of a masked parameter counts its neurons."""
        return neurons_of(self._places[parameter][1])

    def fan_in(self, parameter: Parameter) -> Tensor:
        """The number of active weights of each neuron: int64, of shape ``(neurons,)``."""
        return fan_in(self[parameter], self.neurons(parameter))

    def nnz(self) -> int:
        """The number of active weights in all masks."""
        return sum(int(mask.count_nonzero()) for mask in self.values())

    def sparsity(self) -> float:
        """The fraction of the masked parameters' weights that is inactive, in [0, 1]."""
        return 1.0 - self.nnz() / max(1, sum(mask.numel() for mask in self.values()))

    def __repr__(self) -> str:
        return f"Masks({len(self)} parameters, {self.nnz()} active weights, sparsity {self.sparsity():.4f})"


_Places = dict[Parameter, tuple[str, nn.Module, str]]


def _places(model: nn.Module) -> _Places:
    """The masked parameters of a model: their name, their module, and the name of the mask in it."""
    places: _Places = {}
    for module_name, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            mask = module._buffers.get(f"{attribute}_mask")
            if parameter is None or mask is None or parameter in places:
                continue
            name = _qualified(module_name, attribute)
            check_mask(mask, parameter, name)
            places[parameter] = (name, module, f"{attribute}_mask")
    return places


def _advice_on_pruned(model: nn.Module) -> str | None:
    """How to keep the masks of the model that ``torch.nn.utils.prune`` holds; None: it holds none."""
    modules = model.named_modules()
    pruned = [(name, tensor) for name, module in modules for tensor in pruned_by_pytorch(module)]
    if not pruned:
        return None
    tensor = pruned[0][1]
    others = f", and so were {len(pruned) - 1} more" if len(pruned) > 1 else ""
    return (
        f"{_qualified(*pruned[0])!r} was pruned by torch.nn.utils.prune (its layer has the parameter "
        f"{tensor}_orig and a float {tensor}_mask){others}. For each such layer: "
        f"mask = layer.{tensor}_mask.bool(); torch.nn.utils.prune.remove(layer, {tensor!r}); "
        f"layer.register_buffer('{tensor}_mask', mask). Then call Masks(model) again"
    )


def _qualified(module_name: str, attribute: str) -> str:
    return f"{module_name}.{attribute}" if module_name else attribute


def _buffer(name: str, module: nn.Module, buffer: str) -> Tensor:
    mask = module._buffers.get(buffer)
    if mask is None:
        raise ValueError(f"the mask of {name!r} is gone from the model: make Masks(model) anew")
    return mask


def check_mask(mask: Tensor, parameter: Tensor, name: str) -> None:
    """Raise ``ValueError``, naming the parameter, unless ``mask`` is a mask for it."""
    if not isinstance(mask, Tensor):
        raise ValueError(f"mask for {name!r} is a {type(mask).__name__}, it must be a boolean tensor")
    if mask.shape != parameter.shape:
        raise ValueError(
            f"mask for {name!r} has shape {tuple(mask.shape)}, the parameter has {tuple(parameter.shape)}"
        )
    if mask.dtype != torch.bool:
        raise ValueError(f"mask for {name!r} has dtype {mask.dtype}, it must be torch.bool")
    if mask.layout is not torch.strided:
        raise ValueError(f"mask for {name!r} has layout {mask.layout}, it must be torch.strided")
    if mask.is_inference():
        raise ValueError(f"mask for {name!r} was made under torch.inference_mode: changes to it go unseen")
    if mask.device != parameter.device:
        raise ValueError(f"mask for {name!r} is on {mask.device}, the parameter is on {parameter.device}")
