"""Whether anything has changed since the last step but the numbers in the gradients: one comparison."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor
from torch.nn.parameter import Parameter

from ..kernels import tensor_memory
from ..kernels.tensor_memory import memory_of
from ..masks.mapping import Masks
from .gradients import Gradients, read_gradients

if TYPE_CHECKING:
    from .._native import Snapshot as NativeSnapshot

if tensor_memory.READER is not None:
    from .. import _native

State = MutableMapping[Tensor, dict[str, Any]]

_VERSION = attrgetter("_version")


class Identities:
    """Objects that are equal if they are the same ones: PyTorch would compare the elements of tensors."""

    __slots__ = ("_objects",)

    def __init__(self, objects: Iterable[object] = ()) -> None:
        self._objects = [*objects]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Identities) or len(self._objects) != len(other._objects):
            return False
        return all(map(is_, self._objects, other._objects))

    __hash__ = None  # type: ignore[assignment]


class Snapshot(NamedTuple):
    """All that a prepared step depends on, to be compared and nothing else. Gradients may lie elsewhere in
    every step, but must be as many and as they were.

    Two of them may be equal only as long as the parameters, momentum buffers and masks that the first was
    taken of are held by someone: the native library tells objects apart by where they are.
    """

    groups: object
    """The parameters of each, whether it has momentum and dampening, and its correction."""
    masked: object
    """The parameters that a dict of masks has; those of a ``Masks`` never change."""
    stateful: object
    """The parameters that have a state."""
    memory: object
    """Of parameters, momentum buffers and masks."""
    gradients: object
    """The layout of their memory: their addresses are no part of it."""
    mask_versions: list[int]
    """How often each mask has been written."""


class Look(NamedTuple):
    """What is found at the beginning of a step."""

    gradients: Gradients
    snapshot: Snapshot | NativeSnapshot | None
    """What the step depends on; None where something in ``masks`` is no mask."""
    versions: list[int]
    """How often each tensor that is watched has been written."""
    masks: list[Tensor]
    """To be held for as long as the snapshot is compared: a mapping may make them anew each time."""


def look(
    groups: list[dict[str, Any]],
    state: State,
    masks: Mapping[Parameter, Tensor],
    parameters: list[Parameter],
    watched: list[Tensor],
) -> Look:
    """Look at everything that may have changed since the last step.

    Args:
        groups, state, masks: the optimizer's.
        parameters: those that were last found in ``groups``, each once.
        watched: tensors whose values matter, besides the masks: masked parameters and their buffers.
    """
    owners, mask_tensors = owners_and_masks(masks)
    if READER is not None:
        found = READER.read(_native.Optimizer(groups, state, owners, mask_tensors, parameters, watched))
        if found is not None:
            tensors, addresses, any_negated, snapshot, versions = found
            return Look(Gradients(tensors, addresses, any_negated), snapshot, versions, mask_tensors)
    return _look(groups, state, owners, mask_tensors, parameters, watched)


def owners_and_masks(masks: Mapping[Parameter, Tensor]) -> tuple[list[Parameter], list[Tensor]]:
    """All masks, and who has them, if that may change."""
    if isinstance(masks, Masks):
        return [], masks.tensors()
    return [*masks], [*masks.values()]


def _look(
    groups: list[dict[str, Any]],
    state: State,
    owners: list[Parameter],
    masks: list[Tensor],
    parameters: list[Parameter],
    watched: list[Tensor],
) -> Look:
    """What the native library does, for tensors that it does not know and for an older PyTorch."""
    gradients, layout = read_gradients(parameters)
    versions = versions_of(watched)
    try:
        mask_versions, mask_memory = versions_of(masks), memory_of(masks)
    except (AttributeError, RuntimeError):  # an entry of a dict may be anything, before it is checked
        return Look(gradients, None, versions, masks)
    snapshot = Snapshot(
        groups=[
            (
                Identities(group["params"]),
                group["momentum"] != 0,
                group["dampening"] != 0,
                group["correction"],
            )
            for group in groups
        ],
        masked=Identities(owners),
        stateful=Identities(state),
        memory=(memory_of(parameters), memory_of(_buffers(state)), mask_memory),
        gradients=layout,
        mask_versions=mask_versions,
    )
    return Look(gradients, snapshot, versions, masks)


def versions_of(tensors: Iterable[Tensor]) -> list[int]:
    """How often each has been written, as far as PyTorch sees."""
    return [*map(_VERSION, tensors)]


def _buffers(state: State) -> list[Tensor | None]:
    # A parameter that was loaded by torch.optim.SGD without momentum has None for a buffer.
    try:
        return [own.get("momentum_buffer") for own in state.values()]
    except AttributeError:  # besides parameters, a state may have keys of the user's, with any values
        return [own.get("momentum_buffer") for own in state.values() if isinstance(own, dict)]


READER = None if tensor_memory.READER is None else _native.StepReader(tensor_memory.READER)
