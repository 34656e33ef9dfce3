"""From parameter groups, state and masks to plans: all about a step that holds until something changes.

Four functions in turn: every parameter is looked at; what was found is checked, and nothing is written before
all of it is; what has to be written is (zeros outside masks that changed); the tensors are grouped by device
and dtype, with a plan of one backend for each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from ..kernels.contract import Backend, Plan, Tensors
from ..kernels.fallback import plan_with_fallback
from ..kernels.gpu.device import refuse_capture
from ..kernels.tensor_memory import memory_of
from ..masks.mapping import neurons_in
from ..masks.registered_masks import as_boolean
from ..neurons import Correction, Neurons
from ..user_warning import warn
from .gradients import is_regular
from .overlap import MaskedTensor, check_overlapping_masks, sharing_pairs, turns_of
from .snapshot import Identities, State, versions_of
from .zero_outside import largest_fan_in, zero_outside

_CONCENTRATED = 3
"""Of a neuron with a larger c_i there is a warning."""


class Batch(NamedTuple):
    """The tensors of one turn, device and dtype, and the plan for them."""

    turn: int
    """Larger than that of any batch before it that updates some of the same memory."""
    device: torch.device
    dtype: torch.dtype
    backend: Backend
    plan: Plan
    tensors: list[Tensors]
    positions: list[int]
    """Of their gradients, among those of ``Prepared.parameters``."""
    irregular: list[int]
    """Which of the gradients are not as ``Inputs`` wants them."""


class _Known(NamedTuple):
    """What was found out about a parameter."""

    tensors: Tensors
    facts: tuple[object, ...]
    """What ``tensors`` was made from. The mask was applied then."""
    versions: list[int] | None
    """Of parameter and buffer, after the last step; None if it was broken off."""


class Prepared(NamedTuple):
    """A step, to be made as often as nothing but the numbers in the gradients changes."""

    parameters: list[Parameter]
    """All of the optimizer's, each once."""
    updated: list[Parameter]
    """Those that have a gradient."""
    batches: list[Batch]
    """What is to be done with them."""
    new_buffers: dict[Parameter, Tensor]
    """The momentum buffers that the state is to have after the step."""
    on_host: bool
    """Whether a backend wants all scalars as numbers."""
    has_auto: bool
    """Whether a group leaves it to the layer whether its gradients are corrected. Then there are twice the
    rules of the groups, those of layers that are not behind those of layers that are."""
    is_first_step: bool
    """Whether parameters of a group with dampening are updated for the first time, which goes without: then
    all rules are there once more, without dampening."""
    watched: list[Tensor]
    """Masked parameters and their buffers; what others write there is to be masked."""
    known: dict[Parameter, _Known]


NOTHING = Prepared([], [], [], {}, False, False, False, [], {})


class _Found(NamedTuple):
    """A parameter that has a gradient, or had one before and has a mask."""

    parameter: Parameter
    position: int
    gradient: Tensor | None
    buffer: Tensor | None
    is_new: bool  # the buffer is not in the state yet
    is_undampened: bool  # it is a first step, of a group with dampening
    mask: Tensor | None
    neurons: Neurons
    correction: Correction  # "auto" is resolved
    is_clipped: bool  # its group has a max_grad_norm
    rule: int


def prepare(
    groups: Sequence[dict[str, Any]],
    state: State,
    masks: Mapping[Parameter, Tensor],
    names: Mapping[Tensor, str],
    backend_for: Callable[[torch.device], Backend],
    feeding_norm: Collection[Parameter],
    warned: set[Parameter],
    former: Prepared,
    versions: Sequence[int] | None,
) -> Prepared:
    """Prepare the next steps.

    Args:
        groups, state, masks: the optimizer's; the masks were checked.
        names: what to call each parameter in an error.
        backend_for: the backend for a device; raises if there is none.
        feeding_norm: what is corrected, in the groups whose correction is "auto".
        warned: the parameters of whose mask there was a warning; those of which there is one now are added.
        former: what was prepared before.
        versions: of what ``former`` watched, after the last step; None if that was broken off.

    Raises:
        ValueError: the gradient of a masked parameter is sparse, or a gradient or a momentum buffer has not
            the parameter's shape; or parameters share memory and their masks differ there. Nothing has been
            written then.
        RuntimeError: what would have to be written cannot be while a CUDA graph is captured.
    """
    parameters = list(dict.fromkeys(p for group in groups for p in group["params"]))
    known = _known(former, versions, parameters)
    has_auto = any(group["correction"] == "auto" for group in groups)
    found = _look(parameters, groups, state, masks, feeding_norm, known, has_auto)
    for f in found:
        _check(f, names[f.parameter])
    pairs = sharing_pairs([f.parameter for f in found])
    check_overlapping_masks([MaskedTensor(f.parameter, f.mask, names[f.parameter]) for f in found], pairs)
    turns = turns_of(len(found), pairs)
    facts = [_facts(f) for f in found]
    last = [_if_same(known.get(f.parameter), now) for f, now in zip(found, facts, strict=True)]
    for f, own in zip(found, last, strict=True):
        if own is None and f.correction == "layer" and f.parameter not in warned:
            _warn_of_concentration(f, names[f.parameter], warned)
    backends = {f.parameter.device: backend_for(f.parameter.device) for f in found if f.gradient is not None}
    for f, now, own in zip(found, facts, last, strict=True):
        known[f.parameter] = _get_to_know(f, now, own)
    updated = [f for f in found if f.gradient is not None]
    turns = [turn for f, turn in zip(found, turns, strict=True) if f.gradient is not None]
    return Prepared(
        parameters,
        [f.parameter for f in updated],
        _group(updated, turns, known, backends, former.batches),
        {f.parameter: f.buffer for f in updated if f.is_new and f.buffer is not None},
        any(backend.host_scalars(device) for device, backend in backends.items()),
        has_auto,
        any(f.is_undampened for f in updated),
        [t for f in updated if f.mask is not None for t in _watched(f.parameter, f.buffer)],
        known,
    )


def _known(
    former: Prepared, versions: Sequence[int] | None, parameters: Sequence[Parameter]
) -> dict[Parameter, _Known]:
    """What is known of the parameters after the last step."""
    known = dict(former.known)
    rest = None if versions is None else iter(versions)
    for p in former.updated:
        if known[p].tensors.mask is not None:
            count = len(_watched(p, known[p].tensors.momentum_buffer))
            known[p] = known[p]._replace(versions=None if rest is None else [*islice(rest, count)])
    return {p: known[p] for p in parameters if p in known}


def _look(
    parameters: Sequence[Parameter],
    groups: Sequence[dict[str, Any]],
    state: State,
    masks: Mapping[Parameter, Tensor],
    feeding_norm: Collection[Parameter],
    known: Mapping[Parameter, _Known],
    has_auto: bool,
) -> list[_Found]:
    """Look at every parameter. Nothing is checked or written."""
    group_of = {p: i for i, group in enumerate(groups) for p in group["params"]}
    found = []
    for position, p in enumerate(parameters):
        gradient, mask, index = p.grad, masks.get(p), group_of[p]
        group = groups[index]
        # What never had a gradient is left alone, as SGD would. In a copy, what has a state had one.
        if gradient is None and (mask is None or not (p in known or state.get(p))):
            continue
        has_momentum = group["momentum"] != 0
        buffer = state.get(p, {}).get("momentum_buffer") if has_momentum else None
        is_new = gradient is not None and buffer is None and has_momentum
        if is_new:
            refuse_capture()
            with torch.inference_mode(False):  # an inference tensor has no version to watch
                buffer = torch.zeros_like(p, requires_grad=False)
        is_undampened = is_new and group["dampening"] != 0
        neurons = Neurons() if mask is None else neurons_in(masks, p)
        is_auto = group["correction"] == "auto"
        is_excepted = is_auto and mask is not None and p not in feeding_norm
        correction: Correction = group["correction"]
        if is_auto:
            correction = "none" if is_excepted else "layer"
        rule = index + len(groups) * (is_excepted + (1 + has_auto) * is_undampened)
        found.append(
            _Found(
                p,
                position,
                gradient,
                buffer,
                is_new,
                is_undampened,
                mask,
                neurons,
                correction,
                group["max_grad_norm"] is not None,
                rule,
            )
        )
    return found


def _if_same(last: _Known | None, facts: tuple[object, ...]) -> _Known | None:
    """What was known of a parameter, if nothing about it is another than in the last step."""
    return None if last is None or last.facts != facts else last


def _warn_of_concentration(f: _Found, name: str, warned: set[Parameter]) -> None:
    """Warn of a layer in which Eq. 12 makes some c_i larger than 3, unless only a device knows its mask."""
    if f.mask is None or f.mask.device.type != "cpu":  # no step waits for a device
        return
    active = int(f.mask.count_nonzero())
    if f.mask.numel() <= _CONCENTRATED**2 * active:  # no neuron can have so many
        return
    neurons = f.neurons.count(f.mask.shape)
    largest = largest_fan_in(as_boolean(f.mask), f.neurons) if active else 0
    if largest * neurons <= _CONCENTRATED**2 * active:
        return
    warned.add(f.parameter)
    warn(
        f"{name!r}: fan-in is concentrated in few neurons. Eq. 12 multiplies the gradient of one by "
        f"c_i = {math.sqrt(largest * neurons / active):.2f}: its fan-in is {largest}, the mean of the layer "
        f"{active / neurons:.1f}. With RigL at high sparsity this was seen to cost accuracy, unless "
        f"gradients are clipped{', as they are' if f.is_clipped else ': set max_grad_norm=1'}. Compare with "
        "correction='none' or 'unnormalized' in the parameter group of this layer, or with SET"
    )


def _get_to_know(f: _Found, facts: tuple[object, ...], last: _Known | None) -> _Known:
    """What is known of a parameter now. What lies outside a mask that is new, or over which others have
    written, is zeroed. For ``last`` see ``_if_same``."""
    watched = _watched(f.parameter, f.buffer)
    if f.mask is not None and (last is None or last.versions != versions_of(watched)):
        refuse_capture()
        zero_outside(as_boolean(f.mask), watched)
    return _Known(_tensors(f) if last is None else last.tensors, facts, versions_of(watched))


def _tensors(f: _Found) -> Tensors:
    parameter: Tensor
    parameter, buffer = f.parameter, f.buffer
    given_mask, mask = f.mask, None if f.mask is None else as_boolean(f.mask)
    gradient_dtype = _gradient_dtype(f)
    if parameter.is_complex():
        # Complex numbers are updated as pairs of real ones: every operation of the rule is real-linear, and
        # a mask with each element doubled has the same ratios of fan-in.
        parameter = torch.view_as_real(parameter)
        buffer = None if buffer is None else torch.view_as_real(buffer)
        given_mask, mask = None, None if mask is None else mask.unsqueeze(-1).expand(parameter.shape)
        gradient_dtype = gradient_dtype.to_real()
    # Biases and normalisation parameters are left out of HAM.
    return Tensors(
        parameter, buffer, mask, given_mask, gradient_dtype, f.neurons, f.rule, ham=f.parameter.ndim >= 2
    )


def _facts(f: _Found) -> tuple[object, ...]:
    """What its ``Tensors`` are made from: which tensors, how they lie in memory, what is in the mask; and
    what decides on a warning."""
    tensors = [f.parameter, f.buffer, f.mask]
    version = None if f.mask is None else f.mask._version
    return Identities(tensors), memory_of(tensors), version, _gradient_dtype(f), f.rule, f.correction


def _gradient_dtype(f: _Found) -> torch.dtype:
    return f.parameter.dtype if f.gradient is None else f.gradient.dtype


def _watched(parameter: Tensor, buffer: Tensor | None) -> list[Tensor]:
    return [parameter] if buffer is None else [parameter, buffer]


def _group(
    updated: Sequence[_Found],
    turns: Sequence[int],
    known: Mapping[Parameter, _Known],
    backends: Mapping[torch.device, Backend],
    former: Sequence[Batch],
) -> list[Batch]:
    """One batch for each turn, device and dtype, by turns. A plan stays while its tensors do."""
    places: dict[tuple[int, torch.device, torch.dtype], list[_Found]] = {}
    for f, turn in zip(updated, turns, strict=True):
        dtype = known[f.parameter].tensors.parameter.dtype
        places.setdefault((turn, f.parameter.device, dtype), []).append(f)
    plans = {(batch.turn, batch.device, batch.dtype): batch for batch in former}
    batches = []
    for (turn, device, dtype), members in sorted(places.items(), key=lambda item: item[0][0]):
        tensors = [known[f.parameter].tensors for f in members]
        irregular = [
            i
            for i, f in enumerate(members)
            if f.gradient is not None and not is_regular(f.gradient, tensors[i].parameter)
        ]
        last = plans.get((turn, device, dtype))
        is_known = last is not None and (last.tensors, last.backend) == (tensors, backends[device])
        plan = last.plan if last is not None and is_known else plan_with_fallback(backends[device], tensors)
        positions = [f.position for f in members]
        batches.append(Batch(turn, device, dtype, backends[device], plan, tensors, positions, irregular))
    return batches


def _check(f: _Found, name: str) -> None:
    """Raise ``ValueError`` unless gradient and momentum buffer, which may come from any checkpoint, fit."""
    p, gradient, buffer = f.parameter, f.gradient, f.buffer
    if gradient is not None and gradient.layout is not torch.strided and f.mask is not None:
        raise ValueError(
            f"{name!r} has a mask and a gradient of layout {gradient.layout}, it must be torch.strided"
        )
    if gradient is not None and gradient.shape != p.shape:
        raise ValueError(
            f"the gradient of {name!r} has shape {tuple(gradient.shape)}, the parameter has {tuple(p.shape)}"
        )
    if buffer is not None and buffer.shape != p.shape:
        raise ValueError(
            f"the momentum_buffer of {name!r} has shape {tuple(buffer.shape)}, the parameter has "
            f"{tuple(p.shape)}: the optimizer's state is that of another network"
        )
    if buffer is not None and buffer.device != p.device:
        raise ValueError(
            f"the momentum_buffer of {name!r} is on {buffer.device}, the parameter on {p.device}"
        )
