"""From parameter groups, state and masks to plans: all about a step that holds until something changes.

Three functions in turn: every parameter is looked at and checked, and nothing is written; what has to be
written is (zeros outside masks that changed); the tensors are grouped by device and dtype, with a plan of one
backend for each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from .kernels.contract import Backend, Plan, Tensors
from .kernels.device import refuse_capture
from .kernels.fallback import plan_with_fallback
from .kernels.memory import in_order, memory_order
from .masks import Masks
from .neurons import Neurons
from .snapshot import Same, Snapshot, State, versions_of
from .tensor_memory import Memory, addresses_of


class Batch(NamedTuple):
    """The tensors of one device and dtype, and the plan for them."""

    device: torch.device
    dtype: torch.dtype
    backend: Backend
    plan: Plan
    tensors: list[Tensors]
    positions: list[int]
    """Of their gradients, among those of ``Prepared.parameters``."""
    irregular: list[int]
    """Which of the gradients are not as ``Inputs`` wants them."""

    def regular_gradients(
        self, gradients: list[Tensor | None], memory: Memory | None, may_be_negated: bool
    ) -> tuple[Sequence[Tensor], bytes]:
        """The gradients of the batch as ``Inputs`` wants them, and their addresses.

        Args:
            gradients, memory: of all ``Prepared.parameters``.
            may_be_negated: whether some may be lazily negated.
        """
        is_all = len(self.positions) == len(gradients)
        own = cast("list[Tensor]", gradients if is_all else [gradients[i] for i in self.positions])
        negated = may_be_negated and any(map(Tensor.is_neg, own))
        if is_all and not negated and not self.irregular and memory is not None:
            return own, memory.addresses
        own = list(own)
        for i in range(len(own)) if negated else self.irregular:
            own[i] = _regular(own[i], self.tensors[i].parameter)
        return own, addresses_of(own)


class _Known(NamedTuple):
    """What was found out about a parameter."""

    tensors: Tensors
    facts: tuple[object, ...]
    """What ``tensors`` was made from. The mask was applied then."""
    versions: list[int] | None
    """Of parameter and buffer, after the last step."""


@dataclass
class Prepared:
    """A step, to be made as often as nothing but the numbers in the gradients changes.

    Attributes:
        parameters: all of the optimizer's, each once.
        updated: those that have a gradient.
        batches: what is to be done with them.
        new_buffers: momentum buffers that the state does not have yet, by parameter.
        is_first_step: whether there are new buffers in a group with dampening. A first step goes without:
            the rules of those parameters come behind those of all groups.
        watched: masked parameters and their buffers; what others write there is to be masked.
        gradients: the addresses of the gradients of the last step.
        versions: of what is watched, after the last step; None if it did not come to its end.
        snapshot: what was there after the last step; None: all is to be looked at before the next one.
    """

    parameters: list[Parameter]
    updated: list[Parameter]
    batches: list[Batch]
    new_buffers: dict[Parameter, Tensor]
    is_first_step: bool
    watched: list[Tensor]
    known: dict[Parameter, _Known]
    gradients: bytes = b""
    versions: list[int] | None = None
    snapshot: Snapshot | None = None


class _Found(NamedTuple):
    """A parameter that has a gradient, or had one before and has a mask."""

    parameter: Parameter
    position: int
    group: int
    gradient: Tensor | None
    buffer: Tensor | None
    is_new: bool  # the buffer is not in the state yet
    mask: Tensor | None
    neurons: Neurons


def prepare(
    groups: Sequence[dict[str, Any]],
    state: State,
    masks: Mapping[Parameter, Tensor],
    names: Mapping[Tensor, str],
    backend_for: Callable[[torch.device], Backend],
    former: Prepared | None,
) -> Prepared:
    """Prepare the next steps.

    Args:
        groups, state, masks: the optimizer's; the masks were checked.
        names: what to call each parameter in an error.
        backend_for: the backend for a device; raises if there is none.
        former: what was prepared before.

    Raises:
        ValueError: the gradient of a masked parameter is sparse, or a gradient or a momentum buffer has not
            the parameter's shape. Nothing has been written then.
        RuntimeError: what would have to be written cannot be while a CUDA graph is captured.
    """
    parameters = list(dict.fromkeys(p for group in groups for p in group["params"]))
    known = _known(former, parameters)
    found = _look(parameters, groups, state, masks, names, known)
    backends = {f.parameter.device: backend_for(f.parameter.device) for f in found if f.gradient is not None}
    dampened = {i for i, group in enumerate(groups) if group["dampening"] != 0}
    for f in found:
        rule = f.group + len(groups) * (f.is_new and f.group in dampened)
        known[f.parameter] = _apply(f, rule, known.get(f.parameter))
    updated = [f for f in found if f.gradient is not None]
    return Prepared(
        parameters,
        [f.parameter for f in updated],
        _group(updated, known, backends, former.batches if former else []),
        {f.parameter: f.buffer for f in updated if f.is_new and f.buffer is not None},
        any(f.is_new and f.group in dampened for f in updated),
        [t for f in updated if f.mask is not None for t in _watched(f.parameter, f.buffer)],
        known,
    )


def _regular(gradient: Tensor, parameter: Tensor) -> Tensor:
    """A gradient strided, real, and in its parameter's memory format."""
    if gradient.layout is not torch.strided:
        gradient = gradient.to_dense()
    if gradient.is_complex():
        gradient = torch.view_as_real(gradient.resolve_conj())
    gradient = gradient.resolve_neg()
    if _is_in_order(gradient, parameter):
        return gradient
    return torch.empty_like(parameter, dtype=gradient.dtype).copy_(gradient)


def _is_in_order(gradient: Tensor, parameter: Tensor) -> bool:
    """Whether it lies in memory as its parameter does; where that has gaps, nobody minds."""
    order = memory_order(parameter)
    return in_order(gradient, order) or not in_order(parameter, order)


def _known(former: Prepared | None, parameters: Sequence[Parameter]) -> dict[Parameter, _Known]:
    """What is known of the parameters after the last step."""
    if former is None:
        return {}
    known = dict(former.known)
    versions = None if former.versions is None else iter(former.versions)
    for p in former.updated:
        if known[p].tensors.mask is not None:
            count = len(_watched(p, known[p].tensors.momentum_buffer))
            own = None if versions is None else [*islice(versions, count)]
            known[p] = known[p]._replace(versions=own)
    return {p: known[p] for p in parameters if p in known}


def _look(
    parameters: Sequence[Parameter],
    groups: Sequence[dict[str, Any]],
    state: State,
    masks: Mapping[Parameter, Tensor],
    names: Mapping[Tensor, str],
    known: Mapping[Parameter, _Known],
) -> list[_Found]:
    """Look at every parameter, and check what is found. Nothing is written."""
    group_of = {p: i for i, group in enumerate(groups) for p in group["params"]}
    found = []
    for position, p in enumerate(parameters):
        gradient, mask, name, group = p.grad, masks.get(p), names[p], group_of[p]
        # What never had a gradient is left alone, as SGD would.
        if gradient is None and (mask is None or p not in known):
            continue
        if gradient is not None:
            _check_gradient(gradient, p, mask is not None, name)
        has_momentum = groups[group]["momentum"] != 0
        buffer = state.get(p, {}).get("momentum_buffer") if has_momentum else None
        if buffer is not None:
            _check_buffer(buffer, p, name)
        is_new = gradient is not None and buffer is None and has_momentum
        if is_new:
            refuse_capture()
            with torch.inference_mode(False):  # an inference tensor has no version to watch
                buffer = torch.zeros_like(p, requires_grad=False)
        neurons = masks.neurons(p) if isinstance(masks, Masks) and mask is not None else Neurons()
        found.append(_Found(p, position, group, gradient, buffer, is_new, mask, neurons))
    return found


def _apply(f: _Found, rule: int, known: _Known | None) -> _Known:
    """Zero what lies outside a mask that is new, or whose parameter or buffer others have written."""
    dtype = f.parameter.dtype if f.gradient is None else f.gradient.dtype
    version = None if f.mask is None else f.mask._version
    facts = (*map(_facts, (f.parameter, f.buffer, f.mask)), version, dtype, rule)
    is_new = known is None or known.facts != facts
    watched = _watched(f.parameter, f.buffer)
    if f.mask is not None and (is_new or known is None or known.versions != versions_of(watched)):
        refuse_capture()
        outside = ~f.mask
        for tensor in watched:
            tensor.masked_fill_(outside, 0)
    tensors = _tensors(f, dtype, rule) if is_new or known is None else known.tensors
    return _Known(tensors, facts, versions_of(watched))


def _tensors(f: _Found, gradient_dtype: torch.dtype, rule: int) -> Tensors:
    parameter: Tensor
    parameter, buffer, mask = f.parameter, f.buffer, f.mask
    if parameter.is_complex():
        # Complex numbers are updated as pairs of real ones: every operation of the rule is real-linear, and
        # a mask with each element doubled has the same ratios of fan-in.
        parameter = torch.view_as_real(parameter)
        buffer = None if buffer is None else torch.view_as_real(buffer)
        mask = None if mask is None else mask.unsqueeze(-1).expand(parameter.shape)
        gradient_dtype = gradient_dtype.to_real()
    # Biases and normalisation parameters are left out of HAM.
    return Tensors(parameter, buffer, mask, gradient_dtype, f.neurons, rule, ham=f.parameter.ndim >= 2)


def _facts(tensor: Tensor | None) -> tuple[object, ...]:
    """Which tensor it is, and how it lies in memory."""
    if tensor is None:
        return ()
    return Same([tensor]), tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _watched(parameter: Tensor, buffer: Tensor | None) -> list[Tensor]:
    return [parameter] if buffer is None else [parameter, buffer]


def _group(
    updated: Sequence[_Found],
    known: Mapping[Parameter, _Known],
    backends: Mapping[torch.device, Backend],
    former: Sequence[Batch],
) -> list[Batch]:
    """One batch for each device and dtype. A plan stays while its tensors do."""
    places: dict[tuple[torch.device, torch.dtype], list[_Found]] = {}
    for f in updated:
        dtype = known[f.parameter].tensors.parameter.dtype
        places.setdefault((f.parameter.device, dtype), []).append(f)
    plans = {(batch.device, batch.dtype): batch for batch in former}
    batches = []
    for (device, dtype), members in places.items():
        tensors = [known[f.parameter].tensors for f in members]
        irregular = [i for i, f in enumerate(members) if not _is_regular(f.gradient, tensors[i].parameter)]
        last = plans.get((device, dtype))
        is_known = last is not None and (last.tensors, last.backend) == (tensors, backends[device])
        plan = last.plan if last is not None and is_known else plan_with_fallback(backends[device], tensors)
        positions = [f.position for f in members]
        batches.append(Batch(device, dtype, backends[device], plan, tensors, positions, irregular))
    return batches


def _is_regular(gradient: Tensor | None, parameter: Tensor) -> bool:
    return (
        gradient is not None
        and gradient.layout is torch.strided
        and not gradient.is_complex()
        and _is_in_order(gradient, parameter)
    )


def _check_gradient(gradient: Tensor, p: Parameter, masked: bool, name: str) -> None:
    if gradient.layout is not torch.strided and masked:
        raise ValueError(
            f"{name!r} has a mask and a gradient of layout {gradient.layout}, it must be torch.strided"
        )
    if gradient.shape != p.shape:
        raise ValueError(
            f"the gradient of {name!r} has shape {tuple(gradient.shape)}, the parameter has {tuple(p.shape)}"
        )


def _check_buffer(buffer: Tensor, p: Parameter, name: str) -> None:
    """Raise ``ValueError`` unless a momentum buffer, which may come from any checkpoint, fits."""
    if buffer.shape != p.shape:
        raise ValueError(
            f"the momentum_buffer of {name!r} has shape {tuple(buffer.shape)}, the parameter has "
            f"{tuple(p.shape)}: the optimizer's state is that of another network"
        )
    if buffer.device != p.device:
        raise ValueError(
            f"the momentum_buffer of {name!r} is on {buffer.device}, the parameter on {p.device}"
        )
