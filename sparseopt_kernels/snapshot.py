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


class Same(list[Tensor]):
    """Tensors that are equal if they are the same objects: PyTorch would compare their elements."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and len(self) == len(other) and all(map(is_, self, other))

    __hash__ = None


class Snapshot(NamedTuple):
    """All that a prepared step depends on. Gradients may lie elsewhere in every step, but must be as many
    and as they were."""

    groups: list[tuple[Same, bool]]
    """The parameters of each, and whether it has momentum."""
    masked: Same
    """The parameters that a dict of masks has; those of a ``Masks`` never change."""
    stateful: Same
    """The parameters that have a state."""
    memory: tuple[Memory | None, Memory | None, Memory | None]
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
    gradients: Memory | None,
    watched: Sequence[Tensor],
) -> Snapshot | None:
    """What the next step depends on; None where that cannot be told, and everything is to be looked at.

    Args:
        groups, state, masks: the optimizer's.
        parameters: those that were last found in ``groups``, each once.
        gradients: the memory of their gradients.
        watched: tensors whose values matter, besides the masks: masked parameters and their buffers.
    """
    if isinstance(masks, Masks):
        masked, mask_tensors = Same(), masks.tensors()
    else:
        masked, mask_tensors = Same(masks), list(masks.values())
    # A parameter that was loaded by torch.optim.SGD without momentum has None for a buffer.
    buffers = [own.get("momentum_buffer") for own in state.values()]
    try:
        mask_versions = versions_of(mask_tensors)
    except AttributeError:  # an entry of a dict may be anything, before it is checked
        return None
    memory = memory_of(parameters), memory_of(buffers), memory_of(mask_tensors)
    if gradients is None or None in memory:
        return None
    return Snapshot(
        groups=[(Same(group["params"]), group["momentum"] != 0) for group in groups],
        masked=masked,
        stateful=Same(state),
        memory=memory,
        gradients=gradients.layout,
        mask_versions=mask_versions,
        versions=versions_of(watched),
    )


def versions_of(tensors: Iterable[Tensor]) -> list[int]:
    """How often each has been written, as far as PyTorch sees."""
    return [*map(_VERSION, tensors)]
