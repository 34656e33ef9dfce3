"""Checks of what ``SparseOpt`` is given: hyperparameters, parameter groups and masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, get_args

from torch import Tensor
from torch.nn.parameter import Parameter

from . import kernels
from .correction import Correction
from .kernels.contract import NormOver
from .masks.mapping import Masks, masks_of
from .masks.registered_masks import check_mask, remembered_mask
from .sharding import check_sharding
from .user_warning import warn

_CORRECTIONS = (*get_args(Correction), "auto")
_TAKEN_OUT = "of the whole optimizer"
_NORMS_OVER = get_args(NormOver)


def take_out_arguments(
    group: dict[str, Any],
    masks: Mapping[Parameter, Tensor],
    feeding_norm: set[Parameter] | None,
    backend: str,
) -> None:
    """Take the arguments of the whole optimizer out of a group.

    Wrappers such as SAM and ``ZeroRedundancyOptimizer`` put all arguments into the groups that they make. A
    string takes their place: wrappers copy it into their own groups, and so into what they save, instead of
    the masks and with them the model.

    Raises:
        ValueError: one of them is not the optimizer's.
    """
    is_given: dict[str, Callable[[Any], bool]] = {
        "masks": lambda value: value is masks or (value is None and not masks),
        "feeding_norm": lambda value: (None if value is None else parameters_in(value)) == feeding_norm,
        "backend": lambda value: (
            value == backend or (value == "auto" and kernels.chosen_name(value) == backend)
        ),
    }
    for name, is_own in is_given.items():
        if name not in group:
            continue
        is_taken_out = isinstance(group[name], str) and group[name] == _TAKEN_OUT
        if not (is_taken_out or is_own(group[name])):
            raise ValueError(
                f"a parameter group has {name!r}, and it is not the argument of SparseOpt: "
                "that is one for the whole optimizer"
            )
        group[name] = _TAKEN_OUT


def check_new_parameters(group: dict[str, Any], names: Mapping[Tensor, str]) -> None:
    """Raise ``ValueError`` if a parameter of a new group is in the optimizer already.

    Args:
        group: the new group; an iterator of its parameters becomes a list.
        names: the names of the optimizer's parameters.
    """
    if isinstance(group.get("params"), (Tensor, set)):
        return
    group["params"] = list(group["params"])
    seen = {id(p): name for p, name in names.items()}
    for i, given in enumerate(group["params"]):
        name, p = given if isinstance(given, tuple) else (f"params[{i}] of the new group", given)
        if id(p) in seen:
            raise ValueError(f"{name} is in the optimizer already, as {seen[id(p)]}")


def check_new_group(
    groups: Sequence[dict[str, Any]],
    feeding_norm: Collection[Parameter] | None,
    names: Mapping[Tensor, str],
    backend: str,
) -> None:
    """Check the last of the groups.

    Raises:
        ValueError: a hyperparameter is not valid, or a parameter is sharded in a way that is not supported.
        RuntimeError: the backend cannot update one of its parameters.
    """
    group = groups[-1]
    check_group(group)
    check_norm_over(groups)
    check_auto(group, feeding_norm)
    check_sharding(group["params"], names)
    for device in {p.device for p in group["params"]}:
        kernels.backend_for(backend, device)


def check_is_mapping(masks: object) -> None:
    if not isinstance(masks, Mapping | None):
        raise TypeError(
            f"masks is a {type(masks).__name__}, it must be a Masks or a mapping from parameter to mask: "
            "pass sk.Masks(model) for a model that has masks"
        )


def check_feeding_norm(
    feeding_norm: set[Parameter] | None, names: Mapping[Tensor, str], masks: Mapping[Parameter, Tensor]
) -> None:
    # The optimizer may have a share of the model alone (ZeRO).
    is_of_masks = feeding_norm and isinstance(masks, Masks) and masks.holds_any(feeding_norm)
    if feeding_norm and feeding_norm.isdisjoint(names) and not is_of_masks:
        raise ValueError(
            "feeding_norm has none of the optimizer's parameters: it is that of another model or a copy"
        )


def check_masks(masks: Mapping[Parameter, Tensor], names: Mapping[Tensor, str]) -> None:
    """Raise ``ValueError``, naming the parameter, unless the masks fit the optimizer's parameters.

    ``Masks`` may hold masks of other parameters of its model, and must not be out of date. A mapping of the
    user's must have none but the optimizer's parameters as keys.

    Args:
        masks: the argument of ``SparseOpt``.
        names: what to call each of the optimizer's parameters.
    """
    if isinstance(masks, Masks):
        masks.check_held()
        if names and not masks.holds_any(names):
            raise ValueError(
                "masks are those of another model, or of a copy: their model has none of the optimizer's "
                "parameters. Make Masks(model) of the model that is trained; and SparseOpt after fully_shard "
                "(FSDP2), which replaces parameters"
            )
    for parameter, mask in masks_of(masks, names).items():
        if not isinstance(parameter, Tensor):
            raise ValueError(
                f"masks has the key {parameter!r}, its keys must be parameters: "
                "{model.get_parameter(name): mask}"
            )
        if parameter not in names:
            raise ValueError(
                f"masks has a mask for a parameter of shape {tuple(parameter.shape)}, which is not among the "
                "optimizer's parameters: take it out, add a parameter group with it, or pass "
                "sk.Masks(model), which may hold masks of other parameters of the model"
            )
        check_mask(mask, parameter, names[parameter])


def warn_of_forgotten_masks(parameters: Sequence[Tensor], masks: Mapping[Parameter, Tensor]) -> bool:
    """Warn if parameters have masks in their model that ``masks`` lacks; return if there was a warning."""
    masked = set(masks)
    trained = [p for p in parameters if p.requires_grad and p not in masked]
    forgotten = [place for p in trained if (place := remembered_mask(p)) is not None]
    if forgotten:
        others = len(forgotten) - 1
        names = f"{forgotten[0].name!r}{f' and {others} more' if others else ''}"
        how = "given masks of other parameters alone" if masks else "made without masks="
        warn(
            f"trained dense, although masked in the model: {names}. SparseOpt was {how}: pass "
            f"masks=sk.Masks(model){'' if masks else ', or masks={} if that is what you want'}"
        )
    return bool(forgotten)


def parameters_in(feeding_norm: Mapping[str, Parameter]) -> set[Parameter]:
    if not isinstance(feeding_norm, Mapping):
        raise TypeError(
            f"feeding_norm is a {type(feeding_norm).__name__}, it must be a mapping from name to "
            "parameter, as layers_feeding_norm returns it"
        )
    for name, parameter in feeding_norm.items():
        if not isinstance(parameter, Tensor):
            raise TypeError(
                f"feeding_norm[{name!r}] is a {type(parameter).__name__}, it must be a parameter of the model"
            )
    return set(feeding_norm.values())


def check_group(group: dict[str, Any]) -> None:
    """Raise ``ValueError``, naming the hyperparameter, unless all of them are valid."""
    lr = group["lr"]
    if isinstance(lr, Mapping):
        raise ValueError(f"lr is a {type(lr).__name__}, it must be a number: give masks by name, masks=...")
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr is a tensor of {lr.numel()} elements, it must have one")
    for name in ("lr", "momentum", "dampening", "weight_decay", "ham_alpha", "ham_beta"):
        value = group[name]
        if not (_is_number(value) and math.isfinite(value) and value >= 0.0):
            raise ValueError(f"{name} is {value!r}, it must be a finite number >= 0")
    if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
        raise ValueError(
            f"nesterov=True with momentum={group['momentum']} and dampening={group['dampening']}: "
            "it requires momentum > 0 and dampening = 0"
        )
    limit = group["max_grad_norm"]
    if limit is not None and not (_is_number(limit) and limit is not True and limit > 0):
        raise ValueError(f"max_grad_norm is {limit!r}, it must be a number > 0, or None for no limit")
    check_norm_over([group])
    check_correction(group["correction"])
    if group["differentiable"]:
        raise RuntimeError("differentiable=True is not supported: the step is not differentiable")
    if group["foreach"] and group["fused"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")


def _is_number(value: object) -> bool:
    return value.numel() == 1 if isinstance(value, Tensor) else hasattr(value, "__float__")


def check_correction(correction: str) -> None:
    if correction not in _CORRECTIONS:
        raise ValueError(f"correction is {correction!r}, it must be one of {_CORRECTIONS}")


def check_norm_over(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise ``ValueError`` unless all groups have the same valid ``max_grad_norm_over``."""
    found = {group["max_grad_norm_over"] for group in groups}
    if len(found) > 1:
        raise ValueError(
            f"max_grad_norm_over is {' and '.join(sorted(map(repr, found)))} in different parameter groups, "
            "it must be the same in all of them"
        )
    if not found <= {*_NORMS_OVER}:
        raise ValueError(f"max_grad_norm_over is {found.pop()!r}, it must be one of {_NORMS_OVER}")


def warn_of_norm_without_limit(groups: Sequence[Mapping[str, Any]]) -> None:
    """Warn if a norm over all positions was asked for, and no group has a limit for it."""
    if all(group["max_grad_norm"] is None and group["max_grad_norm_over"] == "dense" for group in groups):
        warn(
            "max_grad_norm_over is 'dense', and max_grad_norm is None: no norm is limited. "
            "Pass max_grad_norm, too"
        )


def check_auto(group: Mapping[str, Any], feeding_norm: Collection[Parameter] | None) -> None:
    """Raise ``ValueError`` if ``"auto"`` is asked for, but not known which layers feed a batch norm."""
    if group["correction"] == "auto" and feeding_norm is None:
        raise ValueError(
            "correction is 'auto', but which layers feed a batch norm is not known: make SparseOpt with "
            "feeding_norm=sk.layers_feeding_norm(model, example_input)"
        )


def names_of(groups: Sequence[Mapping[str, Any]], masks: Mapping[Parameter, Tensor]) -> dict[Tensor, str]:
    """Return the names of all parameters for error messages."""
    names: dict[Tensor, str] = {}
    for i, group in enumerate(groups):
        for j, parameter in enumerate(group["params"]):
            names[parameter] = f"param_groups[{i}]['params'][{j}]"
        names.update(zip(group["params"], group.get("param_names", ()), strict=False))
    if isinstance(masks, Masks):
        names.update({p: name for name, p in masks.named().items() if p in names})
    return names
