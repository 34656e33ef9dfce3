"""Whether anything has changed since the last step but the numbers in the gradients: one comparison."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from operator import attrgetter, is_
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.parameter import Parameter

from .masks import Masks
from .tensor_memory import Memory, memory_of

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
    """All that a prepared step depends on. Gradients may lie elsewhere in every step, but must be as many
    and as they were."""

    groups: list[tuple[Identities, bool, bool, str]]
    """The parameters of each, whether it has momentum and dampening, and its correction."""
    masked: Identities
    """The parameters that a dict of masks has; those of a ``Masks`` never change."""
    stateful: Identities
    """The parameters that have a state."""
    memory: tuple[Memory, Memory, Memory]
    """Of parameters, momentum buffers and masks."""
    gradients: object
    """The layout of their memory: their addresses are no part of it."""
    mask_versions: list[int]
    """How often each mask has been written."""
    versions: list[int]
    """The same of what is watched."""


def take_snapshot(
    groups: Sequence[dict[str, Any]],
    state: State,
    masks: Mapping[Parameter, Tensor],
    parameters: list[Parameter],
    gradients: object,
    watched: Sequence[Tensor],
) -> Snapshot | None:
    """What the next step depends on; None where something in ``masks`` is no mask.

    Args:
        groups, state, masks: the optimizer's.
        parameters: those that were last found in ``groups``, each once.
        gradients: the layout of their gradients.
        watched: tensors whose values matter, besides the masks: masked parameters and their buffers.
    """
    try:
        if isinstance(masks, Masks):
            masked, mask_tensors = Identities(), masks.tensors()
        else:
            masked, mask_tensors = Identities(masks), list(masks.values())
        mask_versions = versions_of(mask_tensors)
    except (AttributeError, RuntimeError):  # an entry of a dict may be anything, before it is checked
        return None
    return Snapshot(
        groups=[
            (
                Identities(group["params"]),
                group["momentum"] != 0,
                group["dampening"] != 0,
                group["correction"],
            )
            for group in groups
        ],
        masked=masked,
        stateful=Identities(state),
        memory=(memory_of(parameters), memory_of(_buffers(state)), memory_of(mask_tensors)),
        gradients=gradients,
        mask_versions=mask_versions,
        versions=versions_of(watched),
    )


def versions_of(tensors: Iterable[Tensor]) -> list[int]:
    """How often each has been written, as far as PyTorch sees."""
    return [*map(_VERSION, tensors)]


def _buffers(state: State) -> list[Tensor | None]:
    # A parameter that was loaded by torch.optim.SGD without momentum has None for a buffer.
    try:
        return [own.get("momentum_buffer") for own in state.values()]
    except AttributeError:  # besides parameters, a state may have keys of the user's, with any values
        return [own.get("momentum_buffer") for own in state.values() if isinstance(own, dict)]
