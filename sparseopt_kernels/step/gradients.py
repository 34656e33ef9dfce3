"""The gradients of a step: read from the parameters, and brought into the form that backends take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from ..kernels.contract import ParamState
from ..kernels.memory import in_order
from ..kernels.tensor_memory import addresses_of, memory_of
from ..sharding import local_parts


class Gradients(NamedTuple):
    """The gradients of some parameters, in their order, and their addresses."""

    tensors: list[Tensor | None]
    addresses: bytes
    any_negated: bool
    """True if PyTorch has a sign for one of them that is not in its memory (``torch.Tensor.is_neg``)."""


def read_gradients(parameters: Sequence[Parameter]) -> tuple[Gradients, object]:
    """Return the gradients, of sharded ones the part of this rank, and the layout of their memory."""
    tensors = local_parts(p.grad for p in parameters)
    layout, addresses = memory_of(tensors)
    return Gradients(tensors, addresses, any(t is not None and t.is_neg() for t in tensors)), layout


def is_regular(gradient: Tensor, param: ParamState) -> bool:
    """Tell if a gradient is strided, real, and in its parameter's memory format, unless that has gaps."""
    if gradient.layout is not torch.strided or gradient.is_complex():
        return False
    if param.dim_order is None:
        return gradient.is_contiguous()
    return in_order(gradient, param.dim_order) or not in_order(param.parameter, param.dim_order)


def regular_gradients(
    gradients: Gradients, positions: Sequence[int], params: Sequence[ParamState], irregular: Sequence[int]
) -> tuple[Sequence[Tensor], bytes]:
    """Return the gradients of a plan in the form of ``Inputs``, and their addresses.

    Args:
        gradients: of all parameters.
        positions: the indices of the plan's gradients among them; none of these is None.
        params: the parameters of the plan.
        irregular: the indices of those whose gradients are not regular.
    """
    are_all = len(positions) == len(gradients.tensors)
    own = cast("list[Tensor]", gradients.tensors if are_all else [gradients.tensors[i] for i in positions])
    negated = gradients.any_negated
    if are_all and not negated and not irregular:
        return own, gradients.addresses
    own = own.copy()
    for i in range(len(own)) if negated else irregular:
        own[i] = _regular(own[i], params[i])
    return own, addresses_of(own)


def _regular(gradient: Tensor, param: ParamState) -> Tensor:
    if gradient.layout is not torch.strided:
        gradient = gradient.to_dense()
    if gradient.is_complex():
        gradient = torch.view_as_real(gradient.resolve_conj())
    gradient = gradient.resolve_neg()
    if is_regular(gradient, param):
        return gradient
    return torch.empty_like(param.parameter, dtype=gradient.dtype).copy_(gradient)
