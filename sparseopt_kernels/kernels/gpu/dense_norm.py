"""The norm of gradients over all positions, masked ones too, in PyTorch: for plans whose kernels visit active
weights alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...correction import Factors
from ..contract import Inputs, ParamState
from .device import keep_for_graph


def dense_squared_norm(
    params: Sequence[ParamState], factors: Sequence[Factors | None], inputs: Inputs
) -> Tensor:
    """Return the sum of ``(c_i g)^2`` over all positions: 0-d, float64, on the device. Nothing waits for it.

    It is one pass over the gradients.
    """
    total = torch.zeros((), dtype=torch.float64, device=params[0].parameter.device)
    keep_for_graph(factors)
    for param, own, gradient in zip(params, factors, inputs.gradients, strict=True):
        if not gradient.numel():
            continue
        neurons = gradient.reshape(*param.parameter.shape[: param.neurons.dim + 1], -1)
        norms = torch.linalg.vector_norm(neurons, dim=-1, dtype=torch.float64)
        if own is not None:
            norms *= param.neurons.broadcast(own.c.double(), norms.shape)
        total += norms.square().sum()
    return total
