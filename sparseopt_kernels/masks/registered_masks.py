"""Finds the masks that are registered as buffers in a model, and the parameters that they belong to.

It also keeps a weak table from parameter to mask, for callers that have only the parameter.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter
from torch.nn.utils import parametrize, prune

from ..neurons import Neurons
from ..sharding import check_sharding, is_sharded, local_part, sharded_like, shards_of, told
from .layers import neurons_of, qualified_name

_SUFFIX = "_mask"


class MaskedParameter(NamedTuple):
    """A parameter of a model, and the buffer that is its mask."""

    name: str
    """The name of the parameter in the model."""
    module: nn.Module
    attribute: str
    """The name of the parameter in its module."""
    buffer: str
    """The name of the mask in its module."""

    @property
    def is_pruned(self) -> bool:
        """True if ``torch.nn.utils.prune`` made the mask: the parameter is ``weight_orig`` then."""
        return self.attribute != self.buffer.removesuffix(_SUFFIX)

    @property
    def mask_name(self) -> str:
        """The name of the mask in the model."""
        return self.name.removesuffix(self.attribute) + self.buffer

    @property
    def dense_name(self) -> str:
        """The name of the parameter in the model without masks: ``"0.weight"`` of ``"0.weight_orig"``."""
        return self.mask_name.removesuffix(_SUFFIX)

    def mask(self) -> Tensor | None:
        """Return the mask, or None if the module no longer has one."""
        return self.module._buffers.get(self.buffer)

    def parameter(self) -> Parameter | None:
        """Return the parameter that the module has under this name now, or None."""
        return self.module._parameters.get(self.attribute)

    def both(self) -> tuple[Parameter, Tensor]:
        """Return the parameter and its mask, which the module must still have."""
        parameter, mask = self.parameter(), self.mask()
        assert parameter is not None
        assert mask is not None
        return parameter, mask

    def neurons(self) -> Neurons:
        """Return the dimension of the parameter that counts its neurons."""
        return neurons_of(self.module)

    def is_gathered(self, parameter: Tensor) -> bool:
        """Tell if the module has the whole of a sharded parameter in its place, for a forward pass."""
        now = self.parameter()
        return (
            is_sharded(parameter) and now is not None and not is_sharded(now) and now.shape == parameter.shape
        )


def masked_parameters(model: nn.Module) -> list[MaskedParameter]:
    """Return all masks of a model, in the order of its parameters. A shared parameter comes once per layer.

    A mask is the buffer ``<name>_mask`` beside the parameter ``<name>``, or beside ``<name>_orig`` in a layer
    that ``torch.nn.utils.prune`` has pruned. A buffer with such a name is not taken for a mask if it is
    neither boolean nor of the parameter's shape. Beside a parameter of one dimension, or one without
    ``weight`` in its name, it must be both.
    """
    return [place for name, module in model.named_modules() for place in _in_module(name, module)]


def registered_masks(places: Iterable[MaskedParameter]) -> dict[Parameter, MaskedParameter]:
    """Return masks of a model by parameter. For a shared parameter, the first layer's mask is returned.

    The mask of a sharded parameter is sharded alike, in the model.

    Raises:
        ValueError: a mask does not fit its parameter; the message names it.
    """
    found: dict[Parameter, MaskedParameter] = {}
    for place in places:
        parameter, mask = place.both()
        if mask.shape == parameter.shape and is_sharded(parameter) and not is_sharded(mask):
            mask = place.module._buffers[place.buffer] = sharded_like(mask, parameter)
        try:
            check_mask(mask, parameter, place.name)
        except ValueError as error:
            raise ValueError(f"{error} (it is the buffer {place.mask_name!r})") from None
        found.setdefault(parameter, place)
    remember(found.values())
    return found


def masks_without_parameter(model: nn.Module) -> Iterator[str]:
    """Yield the names of tensors that have a boolean mask but are computed in every forward pass, because
    ``weight_norm``, ``spectral_norm`` or another parametrization was applied after ``sparsify``."""
    for module_name, module in model.named_modules():
        for buffer, mask in module._buffers.items():
            attribute = buffer.removesuffix(_SUFFIX)
            if mask is None or mask.dtype != torch.bool or attribute == buffer:
                continue
            if attribute in module._parameters:
                continue
            own = module.__dict__.get(attribute)
            is_computed = isinstance(own, Tensor) and own.shape == mask.shape
            if is_computed or parametrize.is_parametrized(module, attribute):
                yield qualified_name(module_name, attribute)


def remembered_mask(parameter: Tensor) -> MaskedParameter | None:
    """Return the registered mask of a parameter if :func:`remember` was told of it and it still holds; else
    None."""
    remembered = _REMEMBERED.get(id(parameter))
    module = None if remembered is None else remembered.module()
    if remembered is None or module is None:
        return None
    place = MaskedParameter(
        name=remembered.name, module=module, attribute=remembered.attribute, buffer=remembered.buffer
    )
    return place if place.mask() is not None and place.parameter() is parameter else None


def remembered_places(masks: Mapping[Parameter, Tensor]) -> list[MaskedParameter]:
    """Return the registered masks in a mapping; a copy of the mapping must :func:`remember` them again."""
    return [place for p in masks if (place := remembered_mask(p)) is not None and place.mask() is masks[p]]


def remember(places: Iterable[MaskedParameter]) -> None:
    """Let :func:`remembered_mask` find these masks."""
    for place in places:
        parameter = place.parameter()
        if parameter is not None:
            _remember(parameter, place)


def check_mask(mask: Tensor, parameter: Tensor, name: str) -> None:
    """Raise ``ValueError``, naming the parameter, unless ``mask`` is a mask for it.

    A mask is boolean, or of floating-point numbers that are all 0 or 1.
    """
    if not isinstance(mask, Tensor):
        raise ValueError(f"mask for {name!r} is a {type(mask).__name__}, it must be a boolean tensor")
    if mask.shape != parameter.shape:
        raise ValueError(
            f"mask for {name!r} has shape {tuple(mask.shape)}, the parameter has {tuple(parameter.shape)}"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(
            f"mask for {name!r} has dtype {mask.dtype}, it must be torch.bool, or floating-point with 0 and 1"
        )
    if mask.layout is not torch.strided:
        raise ValueError(f"mask for {name!r} has layout {mask.layout}, it must be torch.strided")
    if mask.is_inference():
        raise ValueError(f"mask for {name!r} was made under torch.inference_mode: changes to it go unseen")
    if hasattr(mask, "device_mesh") or hasattr(parameter, "device_mesh"):
        _check_sharded_alike(mask, parameter, name)
        mask, parameter = local_part(mask), local_part(parameter)
    if mask.device != parameter.device:
        raise ValueError(f"mask for {name!r} is on {mask.device}, the parameter is on {parameter.device}")
    if mask.numel() > 0 and mask.device.type == "cpu" and mask.data_ptr() == 0:
        raise ValueError(f"mask for {name!r} has no memory: its storage was freed")
    if mask.dtype != torch.bool and mask.device.type != "meta":
        others = int(((mask != 0) & (mask != 1)).count_nonzero())
        if others:
            raise ValueError(
                f"mask for {name!r} has dtype {mask.dtype} and {others} values that are neither 0 nor 1"
            )


def _check_sharded_alike(mask: Tensor, parameter: Tensor, name: str) -> None:
    check_sharding([parameter], {parameter: name})
    if shards_of(mask) != shards_of(parameter):
        raise ValueError(
            f"mask for {name!r} is {told(mask)}, and the parameter is {told(parameter)}: both must be "
            "sharded alike. sk.Masks(model) shards the masks of a model, after fully_shard"
        )


def as_boolean(mask: Tensor) -> Tensor:
    """Return a boolean mask itself, and a boolean copy of a floating-point one."""
    return mask if mask.dtype == torch.bool else mask != 0


class _Remembered(NamedTuple):
    """A ``MaskedParameter`` that does not keep its module alive."""

    name: str
    module: weakref.ref[nn.Module]
    attribute: str
    buffer: str


_REMEMBERED: dict[int, _Remembered] = {}
"""Masks by ``id(parameter)``; the module is asked if the parameter is still the same. A weak reference to a
parameter would keep PyTorch from swapping it (``torch.utils.swap_tensors``)."""


def _remember(parameter: Parameter, place: MaskedParameter) -> None:
    key = id(parameter)

    def forget(module: weakref.ref[nn.Module]) -> None:
        if key in _REMEMBERED and _REMEMBERED[key].module is module:
            del _REMEMBERED[key]

    module = weakref.ref(place.module, forget)
    _REMEMBERED[key] = _Remembered(
        name=place.name, module=module, attribute=place.attribute, buffer=place.buffer
    )


def _in_module(module_name: str, module: nn.Module) -> Iterator[MaskedParameter]:
    hooks = module._forward_pre_hooks.values()
    pruned = {f"{h._tensor_name}_orig" for h in hooks if isinstance(h, prune.BasePruningMethod)}
    for attribute, parameter in module._parameters.items():
        buffer = f"{attribute.removesuffix('_orig') if attribute in pruned else attribute}{_SUFFIX}"
        mask = module._buffers.get(buffer)
        if parameter is None or mask is None:
            continue
        if attribute in pruned or not _is_foreign(mask, attribute, parameter):
            name = qualified_name(module_name, attribute)
            yield MaskedParameter(name=name, module=module, attribute=attribute, buffer=buffer)


def _is_foreign(mask: Tensor, attribute: str, parameter: Parameter) -> bool:
    is_boolean, fits = mask.dtype == torch.bool, mask.shape == parameter.shape
    if parameter.ndim >= 2 and "weight" in attribute:
        return not (is_boolean or fits)
    return not (is_boolean and fits)
