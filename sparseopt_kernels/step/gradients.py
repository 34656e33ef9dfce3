"""The gradients of a step: read from the parameters, and made such as backends want them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from ..kernels.contract import Tensors
from ..kernels.memory import in_order, memory_order
from ..kernels.tensor_memory import addresses_of, memory_of


class Gradients(NamedTuple):
    """Those of some parameters, in their order, and where they lie."""

    tensors: list[Tensor | None]
    addresses: bytes
    any_negated: bool
    """Whether one of them is to be read with the other sign: no memory tells that."""


def read_gradients(parameters: Sequence[Parameter]) -> tuple[Gradients, object]:
    """The gradients, and the layout of their memory."""
    tensors = [p.grad for p in parameters]
    layout, addresses = memory_of(tensors)
    return Gradients(tensors, addresses, any(t is not None and t.is_neg() for t in tensors)), layout


def is_regular(gradient: Tensor, parameter: Tensor) -> bool:
    """Whether it is strided, real, and in its parameter's memory format; where that has gaps, in any."""
    if gradient.layout is not torch.strided or gradient.is_complex():
        return False
    order = memory_order(parameter)
    return in_order(gradient, order) or not in_order(parameter, order)


def regular_gradients(
    gradients: Gradients, positions: Sequence[int], tensors: Sequence[Tensors], irregular: Sequence[int]
) -> tuple[Sequence[Tensor], bytes]:
    """What ``Inputs`` has of the gradients of a plan: regular ones, and their addresses.

    Args:
        gradients: of all parameters.
        positions: those of the plan among them, none of which is None.
        tensors: what the plan updates.
        irregular: which of the plan's gradients are not regular.
    """
    are_all = len(positions) == len(gradients.tensors)
    own = cast("list[Tensor]", gradients.tensors if are_all else [gradients.tensors[i] for i in positions])
    negated = gradients.any_negated
    if are_all and not negated and not irregular:
        return own, gradients.addresses
    own = own.copy()
    for i in range(len(own)) if negated else irregular:
        own[i] = _regular(own[i], tensors[i].parameter)
    return own, addresses_of(own)


def _regular(gradient: Tensor, parameter: Tensor) -> Tensor:
    if gradient.layout is not torch.strided:
        gradient = gradient.to_dense()
    if gradient.is_complex():
        gradient = torch.view_as_real(gradient.resolve_conj())
    gradient = gradient.resolve_neg()
    if is_regular(gradient, parameter):
        return gradient
    return torch.empty_like(parameter, dtype=gradient.dtype).copy_(gradient)
