"""From parameter groups and masks to plans: all about a step that holds until something changes.

Nothing is written before everything is checked; then zeros are written outside masks that have changed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from ..correction import Factors
from ..kernels.contract import Backend, NormOver, ParamState, Plan
from ..kernels.gpu.device import refuse_capture
from ..kernels.memory import dim_order
from ..kernels.reference import REFERENCE
from ..kernels.tensor_memory import Memory, memory_of, versions_of
from ..masks.mapping import neurons_in
from ..masks.registered_masks import as_boolean
from ..neurons import Neurons
from ..sharding import Shards, is_sharded, local_part, shards_of
from .change_detection import State
from .factors import Corrected, with_factors
from .found import Found, RuleSource, check, find, on_this_rank
from .gradients import is_regular
from .overlap import MaskedTensor, check_overlapping_masks, sharing_pairs, turns_of
from .rank_agreement import LayerTotals, ShardedMask
from .zero_outside import zero_outside


class Batch(NamedTuple):
    """The parameters of one turn, device, dtype, backend and mesh, and the plan for them."""

    turn: int
    """Larger than that of any batch before it that updates some of the same memory."""
    device: torch.device
    dtype: torch.dtype
    backend: Backend
    shards: Shards | None
    """The ranks that have the parameters; None if they are not sharded."""
    plan: Plan
    params: list[ParamState]
    positions: list[int]
    """The indices of their gradients among those of ``Prepared.parameters``."""
    irregular: list[int]
    """The indices of the gradients that do not have the form that ``Inputs`` asks for."""


class _Entry(NamedTuple):
    """The cache entry of a parameter."""

    param: ParamState
    backend: Backend
    """The one that updates it: the reference, if that of the device does not support it."""
    held: list[Tensor | None]
    """Parameter, buffer and mask. Their identities in the key hold as long as they live."""
    key: tuple[object, ...]
    """The entry is valid as long as this is unchanged."""
    versions: list[int] | None
    """Those of parameter and buffer after the last step; None if the mask has to be applied."""


class _Sharing(NamedTuple):
    """The pairs of parameters that share memory, by their places, and the memory of all of them."""

    memory: Memory
    pairs: list[tuple[int, int]]


class Prepared(NamedTuple):
    """A step, to be made as often as nothing changes but the numbers in the gradients."""

    parameters: list[Parameter]
    """All of the optimizer's, each once."""
    updated: list[Parameter]
    """Those that have a gradient."""
    rules: list[RuleSource]
    """One for each parameter group, and then those of first steps."""
    batches: list[Batch]
    new_buffers: dict[Parameter, Tensor]
    """The momentum buffers that the state does not have yet."""
    norm_over: NormOver
    """The positions that count in the norm of the gradients, where it is limited."""
    on_host: bool
    """True if a backend wants all scalars as numbers."""
    watched: list[Tensor]
    """Masked parameters and their buffers. Writes of others to them are masked."""
    entries: dict[Parameter, _Entry]
    factors: dict[ParamState, Factors]
    """``c_i`` of those whose gradients are corrected."""
    sharing: _Sharing | None
    shards: Sequence[Shards]
    """The ranks that have sharded parameters, of all of the optimizer's."""

    @property
    def has_first_steps(self) -> bool:
        """True if a rule holds for this step alone."""
        return any(rule.is_first_step for rule in self.rules)


NOTHING_PREPARED = Prepared(
    parameters=[],
    updated=[],
    rules=[],
    batches=[],
    new_buffers={},
    norm_over="active",
    on_host=False,
    watched=[],
    entries={},
    factors={},
    sharing=None,
    shards=(),
)


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
    totals: LayerTotals | None = None,
) -> Prepared:
    """Prepare the next steps.

    Args:
        groups, state, masks: the optimizer's; the masks were checked.
        names: names of the parameters for errors.
        backend_for: returns the backend for a device, or raises.
        feeding_norm: the parameters that are corrected in groups whose correction is "auto".
        warned: the parameters of whose fan-in there was a warning; new ones are added.
        former: the former preparation.
        versions: of what ``former`` watched, after the last step; None if that was broken off.
        totals: adds up what ranks have of sharded parameters; None without any.

    Raises:
        ValueError: the gradient of a masked parameter is sparse, or a gradient or a momentum buffer has not
            the parameter's shape; or parameters share memory and their masks differ there. Nothing has been
            written then.
        RuntimeError: what would have to be written cannot be while a CUDA graph is captured.
    """
    parameters = list(dict.fromkeys(p for group in groups for p in group["params"]))
    entries = _entries_after(former, versions, parameters)
    found = find(parameters, groups, state, masks, feeding_norm, entries)
    if totals:
        found = on_this_rank(found)
    check(found, masks, names)
    sharing = _sharing([f.tensor for f in found], former.sharing)
    if sharing.pairs:
        own = [MaskedTensor(f.tensor, f.mask, names[f.parameter]) for f in found]
        check_overlapping_masks(own, sharing.pairs)
    means = totals.mean_fan_in(_sharded_masks(parameters, masks, names)) if totals else {}
    rules = [RuleSource(group, is_first_step=False) for group in range(len(groups))]
    rules += dict.fromkeys(f.rule for f in found if f.rule.is_first_step)
    # Of sharded parameters, a rank may have gradients of none; where scalars lie is decided alike on all.
    used = parameters if totals else [f.parameter for f in found]
    backends = {device: backend_for(device) for device in {p.device for p in used}}
    new = [
        _entry(
            f, rules, masks, backends[f.parameter.device], means.get(f.parameter), entries.get(f.parameter)
        )
        for f in found
    ]

    updated = [i for i, f in enumerate(found) if f.gradient is not None]
    corrected = [
        Corrected(
            param=new[i].param,
            backend=new[i].backend,
            correction=f.correction,
            parameter=f.parameter,
            name=names[f.parameter],
            is_clipped=f.is_clipped,
            mean_fan_in=means.get(f.parameter),
        )
        for i in updated
        if (f := found[i]).mask is not None and f.correction != "none" and f.mask.numel() > 0
    ]
    factors = with_factors(corrected, former.factors, warned)

    for f, entry in zip(found, new, strict=True):
        is_applied = f.mask is None or entry.versions == versions_of(f.watched)
        entries[f.parameter] = entry if is_applied else _with_mask_applied(f, entry)
    turns = turns_of(len(found), sharing.pairs)
    return Prepared(
        parameters=parameters,
        updated=[found[i].parameter for i in updated],
        rules=rules,
        batches=_batches([_Member(turns[i], found[i], new[i]) for i in updated], factors, former.batches),
        new_buffers={f.parameter: f.stored_buffer for f in found if f.is_new and f.stored_buffer is not None},
        norm_over=groups[0]["max_grad_norm_over"],
        on_host=any(backend.host_scalars(device) for device, backend in backends.items()),
        watched=[t for i in updated if found[i].mask is not None for t in found[i].watched],
        entries=entries,
        factors=factors,
        sharing=sharing,
        shards=totals.shards if totals else (),
    )


def _entries_after(
    former: Prepared, versions: Sequence[int] | None, parameters: Sequence[Parameter]
) -> dict[Parameter, _Entry]:
    """Return the cache entries of the parameters, with their versions after the last step."""
    entries = dict(former.entries)
    rest = None if versions is None else iter(versions)
    for p in former.updated:
        entry = entries[p]
        if entry.param.mask is not None:
            count = 1 if entry.param.momentum_buffer is None else 2
            count *= 2 if former.shards and is_sharded(p) else 1
            entries[p] = entry._replace(versions=None if rest is None else [*islice(rest, count)])
    return {p: entries[p] for p in parameters if p in entries}


def _sharded_masks(
    parameters: Sequence[Parameter], masks: Mapping[Parameter, Tensor], names: Mapping[Tensor, str]
) -> list[ShardedMask]:
    """Return the masks of all sharded parameters, with a gradient or without: as many on every rank."""
    found = []
    for p in parameters:
        shards = shards_of(p) if p in masks else None
        if shards is not None:
            found.append(
                ShardedMask(
                    parameter=p,
                    name=names[p],
                    mask=as_boolean(local_part(masks[p])),
                    neurons=neurons_in(masks, p).count(p.shape),
                    shards=shards,
                )
            )
    return found


def _sharing(parameters: Sequence[Tensor], last: _Sharing | None) -> _Sharing:
    memory = memory_of(parameters)
    if last is not None and last.memory == memory:
        return last
    return _Sharing(memory, sharing_pairs(parameters))


def _entry(
    f: Found,
    rules: Sequence[RuleSource],
    masks: Mapping[Parameter, Tensor],
    of_device: Backend,
    mean_fan_in: float | None,
    last: _Entry | None,
) -> _Entry:
    """Return the cache entry of a parameter: the last one, if its key is unchanged."""
    held, rule = [f.tensor, f.buffer, f.mask], rules.index(f.rule)
    key: tuple[object, ...]
    key = (*map(id, held), memory_of(held), f.mask_writes, f.gradient_dtype, rule, f.correction, of_device)
    key = (*key, mean_fan_in)
    if last is not None and last.key == key:
        return last
    param = _param_state(f, Neurons() if f.mask is None else neurons_in(masks, f.parameter), rule)
    backend = of_device if of_device.supports(param) else REFERENCE
    return _Entry(param=param, backend=backend, held=held, key=key, versions=None)


def _param_state(f: Found, neurons: Neurons, rule: int) -> ParamState:
    parameter, buffer = f.tensor, f.buffer
    given_mask, mask = f.mask, None if f.mask is None else as_boolean(f.mask)
    gradient_dtype = f.gradient_dtype
    if parameter.is_complex():
        # Complex numbers are updated as pairs of real ones: every operation of the rule is real-linear, and
        # a mask with each element doubled has the same ratios of fan-in.
        parameter = torch.view_as_real(parameter)
        buffer = None if buffer is None else torch.view_as_real(buffer)
        given_mask, mask = None, None if mask is None else mask.unsqueeze(-1).expand(parameter.shape)
        gradient_dtype = gradient_dtype.to_real()
    return ParamState(
        parameter=parameter,
        momentum_buffer=buffer,
        mask=mask,
        given_mask=given_mask,
        gradient_dtype=gradient_dtype,
        dim_order=dim_order(parameter),
        neurons=neurons,
        rule=rule,
        ham=f.tensor.ndim >= 2,  # biases and normalisation parameters are left out
    )


def _with_mask_applied(f: Found, entry: _Entry) -> _Entry:
    """Zero the elements outside a mask that is new, or over which others have written."""
    assert f.mask is not None
    refuse_capture(f.mask.device)
    zero_outside(as_boolean(f.mask), f.masked)
    return entry._replace(versions=versions_of(f.watched))


class _Member(NamedTuple):
    """A parameter that is updated, and its turn."""

    turn: int
    found: Found
    entry: _Entry


def _batches(
    members: Sequence[_Member], factors: Mapping[ParamState, Factors], former: Sequence[Batch]
) -> list[Batch]:
    """Return one batch for each turn, device, dtype, backend and mesh, by turns. A plan stays while its
    parameters do."""
    groups: dict[tuple[int, torch.device, torch.dtype, Backend, Shards | None], list[_Member]] = {}
    for member in members:
        param, backend = member.entry.param, member.entry.backend
        key = member.turn, param.parameter.device, param.parameter.dtype, backend, member.found.shards
        groups.setdefault(key, []).append(member)
    last = {(own.turn, own.device, own.dtype, own.backend, own.shards): own for own in former}
    batches = []
    for key, own in sorted(groups.items(), key=lambda item: item[0][0]):
        params = [member.entry.param for member in own]
        if key in last and last[key].params == params:
            plan = last[key].plan
        else:
            plan = key[3].plan(params, [factors.get(param) for param in params])
        positions = [member.found.position for member in own]
        irregular = [
            i
            for i, (member, param) in enumerate(zip(own, params, strict=True))
            if member.found.gradient is not None and not is_regular(member.found.gradient, param)
        ]
        turn, device, dtype, backend, shards = key
        batches.append(
            Batch(
                turn=turn,
                device=device,
                dtype=dtype,
                backend=backend,
                shards=shards,
                plan=plan,
                params=params,
                positions=positions,
                irregular=irregular,
            )
        )
    return batches
