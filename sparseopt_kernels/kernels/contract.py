"""What a backend is asked: to make a plan for some parameters, once, and to carry it out at every step.

A backend is an object of type ``Backend``, in the registry of ``kernels``. Everything it is handed is
complete and frozen. Tensors fit together. Hyperparameters were checked when their group was made, and may be
any numbers since. A backend raises nothing but errors of the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ..correction import Factors
from ..neurons import Neurons

if TYPE_CHECKING:
    from ..native_library import Table

NormOver = Literal["active", "dense"]
"""The positions that count in the norm of a masked gradient: active ones, or all."""


@dataclass(frozen=True, eq=False)
class ParamState:
    """One parameter, and what a step reads and writes beside it.

    ``parameter``, ``momentum_buffer`` (None where momentum is 0) and ``mask`` (boolean; None: dense) have one
    shape and one device; complex parameters come as real ones with a last dimension of 2. Outside the mask,
    parameter and buffer hold zeros: a backend may leave memory alone that holds no active weight. A buffer
    that no step has written yet holds zeros, too.

    It is compared by identity, and replaced by another when anything about it changes, the values in the mask
    and the correction included: what was derived from it holds as long as the same object is handed over.
    """

    parameter: Tensor
    momentum_buffer: Tensor | None
    mask: Tensor | None
    given_mask: Tensor | None
    """The user's mask, of which ``mask`` may be a boolean copy; None where ``mask`` is laid out otherwise."""
    gradient_dtype: torch.dtype
    dim_order: tuple[int, ...] | None
    """The dimensions of the parameter from the largest stride to the smallest; None: it is contiguous."""
    neurons: Neurons
    """Where the neurons of the mask lie."""
    rule: int
    """The index of the parameter's rule in ``Inputs.rules``."""
    ham: bool
    """True if HAM applies to the parameter, where its rule asks for HAM."""


class Rule(NamedTuple):
    """The hyperparameters of the parameters of a group at one step; of those that are updated for the first
    time, or of all others.

    A tensor among them is 0-d, on the device of the plan and of the type of its arithmetic.
    """

    lr: float | Tensor
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool
    ham_alpha: float
    ham_beta: float
    gamma: float | Tensor
    """What the gradient is multiplied by besides c_i: the gradient-norm coefficient (Appendix F), and
    1/grad_scale (AMP) where that is no tensor of the inputs."""


class Inputs(NamedTuple):
    """What changes from step to step.

    ``gradients`` are those of the plan's tensors: strided, on their device, of their ``gradient_dtype``, and
    in the memory format of their parameter unless that has gaps. ``addresses`` are those of their memory, an
    unsigned integer of 8 bytes each.

    Where the host would have to wait for a device to know a number, the number stays there: ``grad_scale``
    and ``found_inf`` are GradScaler's, 0-d float32 on the device, or None. Gradients are divided by the
    former, and nothing at all is written where the latter is not 0. A backend with ``host_scalars`` gets
    plain numbers instead (both are None), and is not called for a step that AMP skips.
    """

    gradients: Sequence[Tensor]
    addresses: bytes
    rules: Sequence[Rule]
    grad_scale: Tensor | None
    found_inf: Tensor | None


class UnseenWrite(NamedTuple):
    """A write that PyTorch has not counted: to a mask, or to weights outside of one."""

    param: ParamState
    to_mask: bool


class Plan(Protocol):
    """How a backend updates certain parameters, all of one device and dtype."""

    def step(self, inputs: Inputs) -> None:
        """Apply the update rule, in place."""

    def squared_norm(self, inputs: Inputs, over: NormOver) -> Tensor:
        """Return the sum of ``(c_i g)^2`` over these positions: 0-d, float64, on the device.

        A masked position has the ``c_i`` of its neuron.
        """

    def unseen_writes(self, everything: bool) -> list[UnseenWrite]:
        """Return the writes since the last step that PyTorch has not counted, as far as they were noticed.

        Called before a step, when all tensors are where they were.

        Args:
            everything: look at all memory; else at as much of it as costs next to nothing, another part in
                each call. A backend that cannot look finds none.
        """

    def native_table(self) -> Table | None:
        """Return what the native library needs to make the step by itself; None if that is not all of it."""


class Backend(Protocol):
    """One way to carry out steps."""

    def unavailable(self, device: torch.device) -> str | None:
        """Return why it cannot update tensors on that device; None if it can."""

    def host_scalars(self, device: torch.device) -> bool:
        """Return True if it wants all scalars as numbers: see ``Inputs``."""

    def supports(self, param: ParamState) -> bool:
        """Return True if it can update the parameter; if not, the reference backend does."""

    def fan_in(self, params: Sequence[ParamState]) -> Tensor:
        """Count the fan-in of the neurons of masks that it supports, all of one device and dtype.

        Returns:
            One number for each neuron, layer after layer, of the floating-point type that the factors are to
            have.
        """

    def plan(self, params: Sequence[ParamState], factors: Sequence[Factors | None]) -> Plan:
        """Return a plan for parameters that it supports, all of one device and dtype.

        Args:
            params: the parameters.
            factors: of each, of the type of ``fan_in``. None: all ``c_i`` are 1.
        """
