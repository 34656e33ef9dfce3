"""Checks of the arguments that all sparse training methods have: masks, steps and ``min_fan_in``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from torch import Tensor
from torch.nn.parameter import Parameter

from ..masks.mapping import Masks, neurons_in
from ..masks.registered_masks import check_mask
from ..user_warning import warn
from .agreement import Group


def check_masks(masks: Mapping[Parameter, Tensor]) -> list[str]:
    """Return the name of each layer; the layers of a mapping without names are numbered.

    Raises:
        TypeError: a key is not a parameter.
        ValueError: there is no mask, or one does not fit its parameter.
    """
    if not isinstance(masks, Mapping):
        raise TypeError(
            f"masks is a {type(masks).__name__}, it must be a Masks or a mapping from parameter to mask: "
            "pass sk.Masks(model) for a model that has masks"
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


def check_steps(update_every: int, start_at: int, stop_at: float) -> None:
    """Raise ``ValueError`` unless these say in which steps masks are updated."""
    if not _is_whole(update_every, least=1):
        raise ValueError(f"update_every is {update_every!r}, it must be an integer of at least 1 (steps)")
    if not _is_whole(start_at, least=0):
        raise ValueError(f"start_at is {start_at!r}, it must be an integer of at least 0 (steps)")
    if not (isinstance(stop_at, Real) and stop_at > 0.0):
        raise ValueError(f"stop_at is {stop_at!r}, it must be positive (steps)")


def check_options(skip_step: bool, min_fan_in: int, seed: int) -> None:
    """Raise ``TypeError`` or ``ValueError``, naming the argument, unless these are as they must be."""
    if not isinstance(skip_step, bool):
        raise TypeError(f"skip_step is {skip_step!r}, it must be True or False")
    if not isinstance(min_fan_in, Integral) or not _is_whole(min_fan_in, least=0):
        raise ValueError(f"min_fan_in is {min_fan_in!r}, it must be an integer of at least 0 (inputs)")
    if not _is_whole(seed, least=-math.inf):
        raise ValueError(f"seed is {seed!r}, it must be an integer")


def check_count(name: str, value: int) -> None:
    """Raise ``ValueError``, naming the argument, unless it is an integer of at least 0."""
    if not _is_whole(value, least=0):
        raise ValueError(f"{name} is {value!r}, it must be an integer of at least 0")


def check_fraction(name: str, value: float) -> None:
    """Raise ``ValueError``, naming the argument, unless it is a number in [0, 1]."""
    if not (isinstance(value, Real) and 0.0 <= value <= 1.0):
        raise ValueError(f"{name} is {value!r}, it must be in [0, 1]")


def _is_whole(value: Any, least: float) -> bool:
    """Tell if a value is a whole number, of any type but bool, that is not less than ``least``."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return bool(is_number and value >= least and math.isfinite(value) and value == int(value))


def checked_state(
    state_dict: Mapping[str, Any], present: Mapping[str, Any], former: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Return the state of a method, with settings that there were not when it was saved.

    Args:
        state_dict: the state.
        present: the method's settings. There is a warning if one is replaced that is not in the state.
        former: the values of settings before they could be chosen.

    Raises:
        ValueError: it has other keys than it must have.
    """
    for name, value in former.items():
        if name in present and name not in state_dict:
            if present[name] != value:
                warn(
                    f"state_dict has no {name}: it is {value} from here on, and not {present[name]}, as given"
                )
            state_dict = {name: value, **state_dict}
    expected = {*present, "step", "due", "explored"}
    if set(state_dict) != expected:
        raise ValueError(f"state_dict has keys {sorted(state_dict)}, it must have {sorted(expected)}")
    check_count("state_dict['step']", state_dict["step"])
    return state_dict


def check_process_group(process_group: Group) -> None:
    """Raise ``ValueError`` unless it is a process group, ``"world"`` or None."""
    if isinstance(process_group, str) and process_group != "world":
        raise ValueError(f"process_group is {process_group!r}, it must be a process group, 'world' or None")


def check_not_pruned(method: str, names: Iterable[str]) -> None:
    """Raise ``ValueError`` if ``torch.nn.utils.prune`` masks a layer in its forward pass."""
    for name in names:
        if name.endswith("_orig"):
            own = name.rpartition(".")[2][:-5]
            raise ValueError(
                f"{name!r} was pruned by torch.nn.utils.prune, which multiplies it by its mask in every "
                f"forward pass: inactive weights have no gradient, and {method} cannot rank them. For each "
                f"such layer: mask = layer.{own}_mask.bool(); torch.nn.utils.prune.remove(layer, {own!r}); "
                f"layer.register_buffer('{own}_mask', mask). Then make Masks(model) anew. SET works without "
                "that"
            )


def check_present_masks(masks: Mapping[Parameter, Tensor], names: Sequence[str]) -> None:
    """Raise ``ValueError`` if a masked parameter was replaced in its model, or a mask fits no more."""
    if isinstance(masks, Masks):
        masks.check_held()
    for name, (parameter, mask) in zip(names, masks.items(), strict=True):
        check_mask(mask, parameter, name)


def check_min_fan_in(
    min_fan_in: int, masks: Mapping[Parameter, Tensor], names: Sequence[str], active: Sequence[int]
) -> None:
    """Raise ``ValueError`` for a layer that has fewer active weights than its neurons need.

    Args:
        min_fan_in: the number of inputs that each neuron needs.
        masks: by parameter; their values do not matter.
        names: the name of each layer.
        active: the number of active weights of each layer.
    """
    if not min_fan_in:
        return
    for name, parameter, count in zip(names, masks, active, strict=True):
        number = neurons_in(masks, parameter).count(parameter.shape)
        needed = number * min_fan_in if parameter.numel() else 0
        if needed > count:
            raise ValueError(
                f"min_fan_in is {min_fan_in}: {number} neurons of {name!r} need {needed} active weights, "
                f"it has {count}"
            )
