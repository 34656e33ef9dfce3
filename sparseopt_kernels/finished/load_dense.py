"""Loading a dense checkpoint, which has no masks, into a masked model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from ..masks.mapping import Masks
from ..masks.registered_masks import MaskedParameter, masked_parameters
from ..step.zero_outside import zero_outside_masks

_ADVICE = "a dense checkpoint? sparseopt_kernels.load_dense(model, state_dict) keeps the masks"


def load_dense(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Load a dense checkpoint into a masked model: the masks stay, and weights outside them are zeroed.

    Apart from masks, it is as strict as ``model.load_state_dict(state_dict)``, with the same messages: names
    must be those of ``model``, wrappers (``module.``) included. As with ``load_state_dict``, tensors that fit
    may have been loaded when it raises; weights outside the masks are zero even then. The momentum of an
    optimizer is not changed.

    Args:
        model: a model with masks of :func:`sparsify`, of your own, or of ``torch.nn.utils.prune`` (which gets
            ``weight`` as its ``weight_orig``).
        state_dict: of the same model without masks, such as :func:`finalize` leaves it.

    Raises:
        ValueError: the model has no mask, or ``state_dict`` has masks: ``model.load_state_dict`` loads those.
        RuntimeError: a key is missing or unexpected, or a tensor has another shape.
    """
    masks, places = Masks(model), masked_parameters(model)
    for place in places:
        if place.mask_name in state_dict:
            raise ValueError(
                f"state_dict has the mask {place.mask_name!r}: use model.load_state_dict(state_dict), which "
                "loads masks and weights"
            )
    try:
        model.load_state_dict(_with_masks(state_dict, places))
    finally:
        zero_outside_masks(masks)


def _with_masks(state_dict: Mapping[str, Any], places: list[MaskedParameter]) -> Mapping[str, Any]:
    """Return the dense ``state_dict`` with the masked model's keys, and with its own masks added."""
    complete: OrderedDict[str, Any] = OrderedDict(state_dict)
    if hasattr(state_dict, "_metadata"):  # the versions of modules: _load_from_state_dict depends on them
        complete._metadata = state_dict._metadata  # type: ignore[attr-defined]
    for place in places:
        if place.dense_name in complete:
            complete[place.name] = complete.pop(place.dense_name)
        if place.buffer not in place.module._non_persistent_buffers_set:
            complete[place.mask_name] = place.mask()
    return complete


class _MissingMask(str):
    """The name of a mask that a state dict lacks; formatted, it is followed by advice.

    It compares equal to the name. PyTorch offers no other way: a hook that adds to ``error_msgs`` would raise
    with ``strict=False`` too, and no hook is told of ``strict``.
    """

    __slots__ = ()

    def __format__(self, format_spec: str) -> str:
        return f"{super().__format__(format_spec)} ({_ADVICE})"


def register_load_advice(module: nn.Module) -> None:
    """Make PyTorch's error for a state dict without the masks of ``module`` mention :func:`load_dense`.

    The hook survives ``deepcopy`` and pickle of the model. With ``strict=False`` the only change is that the
    missing key is followed by the advice when it is formatted.

    Args:
        module: the layer that has the mask as a buffer.
    """
    if _advise not in module._load_state_dict_post_hooks.values():
        module.register_load_state_dict_post_hook(_advise)  # type: ignore[no-untyped-call]


def remove_load_advice(module: nn.Module) -> None:
    """Undo :func:`register_load_advice`, if it was called."""
    hooks = module._load_state_dict_post_hooks
    for key in [key for key, hook in hooks.items() if hook is _advise]:
        del hooks[key]


def _advise(module: nn.Module, keys: _IncompatibleKeys) -> None:
    """Replace the key of the first mask that is missing, although its weight is present, by a
    ``_MissingMask``."""
    missing = keys.missing_keys
    if any(isinstance(key, _MissingMask) for key in missing):
        return
    masks = {name for name in module._buffers if name.endswith("_mask")}
    for i, key in enumerate(missing):
        if key.rpartition(".")[2] in masks and key.removesuffix("_mask") not in missing:
            missing[i] = _MissingMask(key)
            return
