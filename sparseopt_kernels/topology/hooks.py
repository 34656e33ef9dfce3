"""The types that the hooks of a sparse training method are given and return.

Nothing here chooses weights or writes to tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeAlias

from torch import Tensor
from torch.nn.parameter import Parameter

from ..masks.registered_masks import as_boolean
from ..neurons import Neurons, fan_in
from ..sharding import local_part


@dataclass(frozen=True, eq=False)
class Layer:
    """A masked layer before an update. Hooks may read its tensors, and must not write to them.

    Of a sharded layer (FSDP2), tensors are those of the rows that this rank has, and numbers are those of the
    whole layer.
    """

    index: int
    """Its place among all masks of the method, from 0 on."""
    name: str
    """The name of its weight in the model; ``"parameter 0"`` and so on, if the masks are a dict."""
    parameter: Parameter
    """The weight as the model has it."""
    stored_mask: Tensor
    """The mask as the user has it, which may have floating-point numbers that are 0 or 1."""
    neurons: Neurons
    """The dimension of the weight that counts its neurons."""
    active: int
    """The number of active weights."""
    missing: int
    """The number of inputs that its neurons have less than ``min_fan_in``, all together. A layer that grows
    must grow at least so many."""

    @cached_property
    def weight(self) -> Tensor:
        """The weight. It is 0 outside the mask, unless the user has written there."""
        return local_part(self.parameter)

    @property
    def mask(self) -> Tensor:
        """The mask as a boolean tensor of the weight's shape, True where a weight is active."""
        return as_boolean(self.stored_mask)

    @cached_property
    def gradient(self) -> Tensor | None:
        """The dense gradient, of the weight's shape; None without one."""
        return None if self.parameter.grad is None else local_part(self.parameter.grad)

    @property
    def numel(self) -> int:
        """The number of weights, active or not."""
        return self.parameter.numel()

    @property
    def mean_fan_in(self) -> float:
        """The mean number of active weights of a neuron."""
        return self.active / max(1, self.neurons.count(self.parameter.shape))

    def fan_in(self) -> Tensor:
        """Return the number of active weights of each neuron: int64, of shape ``(neurons,)``."""
        return fan_in(self.stored_mask, self.neurons)


class Counts(NamedTuple):
    """The numbers of weights that an update drops and grows in a layer.

    Two numbers for the layer, or two int64 tensors of shape ``(neurons,)`` with the numbers of each neuron.
    """

    drop: int | Tensor
    """The number of active weights that leave the mask."""
    grow: int | Tensor = 0
    """The number of weights that become active, among all that are not kept."""

    @property
    def by_neuron(self) -> bool:
        """True if these are the numbers of each neuron."""
        return isinstance(self.grow, Tensor)

    @property
    def drops(self) -> bool:
        """True if any weight is dropped."""
        return _is_positive(self.drop)

    @property
    def grows(self) -> bool:
        """True if any weight grows."""
        return _is_positive(self.grow)


def _is_positive(count: int | Tensor) -> bool:
    return bool(count.any()) if isinstance(count, Tensor) else count > 0


class Magnitude(NamedTuple):
    """The score ``|values| * factors``.

    ``Magnitude(layer.gradient)`` and ``Magnitude(layer.weight)`` are ranked as they lie in memory, without a
    tensor of scores.
    """

    values: Tensor
    """A tensor of the weight's shape."""
    factors: Tensor | None = None
    """Not negative, and broadcast to the shape of the values; None for 1."""


Score: TypeAlias = Tensor | Magnitude
"""A real number for each weight of a layer: a tensor of the weight's shape, or a ``Magnitude``."""
