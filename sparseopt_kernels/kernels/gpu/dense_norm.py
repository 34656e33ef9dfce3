"""The norm of gradients over all positions, masked ones too, by PyTorch: for plans whose kernels visit active
weights alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...neurons import Correction, correction_factors
from ..contract import Inputs, Tensors
from ..derived import Derived
from .device import keep_for_graph, refuse_capture


def dense_squared_norm(tensors: Sequence[Tensors], inputs: Inputs) -> Tensor:
    """Return the sum of ``(c_i g)^2`` over all positions: 0-d, float64, on the device. Nothing waits for it.

    It is one pass over the gradients. The squares of ``c_i`` are kept for as long as their mask.
    """
    total = torch.zeros((), dtype=torch.float64, device=tensors[0].parameter.device)
    squared = _SQUARED_FACTORS(tensors)
    keep_for_graph(squared)
    for own, gradient, factors in zip(tensors, inputs.gradients, squared, strict=True):
        if not gradient.numel():
            continue
        neurons = gradient.reshape(*own.parameter.shape[: own.neurons.dim + 1], -1)
        norms = torch.linalg.vector_norm(neurons, dim=-1, dtype=torch.float64)
        correction = inputs.rules[own.group].correction
        squares = norms.square()
        total += (squares * factors[correction] if correction in factors else squares).sum()
    return total


def _squared_factors(tensors: Tensors) -> dict[Correction, Tensor]:
    """The squares of c_i, of shape ``parameter.shape[:neurons.dim + 1]``; empty: they are 1."""
    if tensors.mask is None:
        return {}
    refuse_capture()  # a graph computes nothing before it is replayed
    shape = tensors.mask.shape[: tensors.neurons.dim + 1]
    corrections: tuple[Correction, ...] = ("layer", "unnormalized")
    return {
        c: correction_factors(tensors.mask, tensors.neurons, c).reshape(shape).square() for c in corrections
    }


_SQUARED_FACTORS = Derived(_squared_factors)
