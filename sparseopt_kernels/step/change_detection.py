"""Tells if anything has changed since the last step but the numbers in the gradients: one comparison."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from operator import is_
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.parameter import Parameter

from .. import native_library
from ..kernels import tensor_memory
from ..kernels.tensor_memory import memory_of, versions_of
from ..masks.mapping import Masks
from ..sharding import local_parts, with_local_parts
from .gradients import Gradients, read_gradients

State = MutableMapping[Tensor, dict[str, Any]]


class Identities:
    """Objects that are compared by identity: PyTorch would compare the elements of tensors."""

    __slots__ = ("_objects",)

    def __init__(self, objects: Iterable[object] = ()) -> None:
        self._objects = [*objects]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Identities) or len(self._objects) != len(other._objects):
            return False
        return all(map(is_, self._objects, other._objects))


class Snapshot(NamedTuple):
    """All that a prepared step depends on, only to be compared.

    Gradients may lie elsewhere in every step, but must be as many and of the same layout. Two snapshots may
    be compared only as long as the parameters, momentum buffers and masks of the first one live: the native
    library tells objects apart by their addresses.
    """

    groups: object
    """The parameters of each group, whether it has momentum and dampening, its correction and its norm."""
    masked: object
    """The parameters in a dict of masks; those of a ``Masks`` never change."""
    stateful: object
    """The parameters that have a state."""
    memory: object
    """The memory of parameters, momentum buffers and masks."""
    gradients: object
    """The layout of the gradients' memory, without addresses."""
    mask_versions: list[int]
    """The number of writes to each mask, as PyTorch counts them."""


class Observed(NamedTuple):
    """The state of everything at the beginning of a step."""

    gradients: Gradients
    snapshot: Snapshot | native_library.Snapshot | None
    """None, which equals no other: after a first step with dampening, and where something in ``masks`` is no
    mask."""
    versions: list[int]
    """The number of writes to each watched tensor."""
    masks: list[Tensor]
    """Held as long as the snapshot is compared: a mapping may make them anew each time."""


def observe(
    groups: list[dict[str, Any]],
    state: State,
    masks: Mapping[Parameter, Tensor],
    parameters: list[Parameter],
    watched: list[Tensor],
) -> Observed:
    """Read everything that may have changed since the last step.

    Args:
        groups, state, masks: the optimizer's.
        parameters: those that were last found in ``groups``, each once.
        watched: tensors whose values matter, besides the masks: masked parameters and their buffers.
    """
    owners, mask_tensors = owners_and_masks(masks)
    if READER is not None:
        optimizer = native_library.Optimizer(groups, state, owners, mask_tensors, parameters, watched)
        found = READER.read(optimizer)
        if found is not None:
            tensors, addresses, any_negated, snapshot, versions = found
            gradients = Gradients(tensors, addresses, any_negated)
            return Observed(gradients=gradients, snapshot=snapshot, versions=versions, masks=mask_tensors)
    return _observe_in_python(groups, state, owners, mask_tensors, parameters, watched)


def owners_and_masks(masks: Mapping[Parameter, Tensor]) -> tuple[list[Parameter], list[Tensor]]:
    """Return all masks, and the parameters that have them, if these may change."""
    if isinstance(masks, Masks):
        return [], masks.tensors()
    return [*masks], [*masks.values()]


def _observe_in_python(
    groups: list[dict[str, Any]],
    state: State,
    owners: list[Parameter],
    masks: list[Tensor],
    parameters: list[Parameter],
    watched: list[Tensor],
) -> Observed:
    """Do what the native library does, for tensors that it does not know and for an older PyTorch."""
    gradients, layout = read_gradients(parameters)
    versions = versions_of(watched)
    try:
        mask_versions, mask_memory = versions_of(with_local_parts(masks)), memory_of(local_parts(masks))
    except (AttributeError, RuntimeError):  # an entry of a dict may be anything, before it is checked
        return Observed(gradients=gradients, snapshot=None, versions=versions, masks=masks)
    snapshot = Snapshot(
        groups=[
            (
                Identities(group["params"]),
                group["momentum"] != 0,
                group["dampening"] != 0,
                group["correction"],
                group["max_grad_norm_over"],
            )
            for group in groups
        ],
        masked=Identities(owners),
        stateful=Identities(state),
        memory=(memory_of(local_parts(parameters)), memory_of(local_parts(_buffers(state))), mask_memory),
        gradients=layout,
        mask_versions=mask_versions,
    )
    return Observed(gradients=gradients, snapshot=snapshot, versions=versions, masks=masks)


def _buffers(state: State) -> list[Tensor | None]:
    # A parameter that was loaded by torch.optim.SGD without momentum has None for a buffer.
    try:
        return [own.get("momentum_buffer") for own in state.values()]
    except AttributeError:  # besides parameters, a state may have keys of the user's, with any values
        return [own.get("momentum_buffer") for own in state.values() if isinstance(own, dict)]


READER = None if tensor_memory.READER is None else native_library.StepReader(tensor_memory.READER)
