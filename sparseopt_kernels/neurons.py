"""What the update rule needs to know of a weight: where its neurons lie, their fan-in, c_i, the arithmetic.

Imports nothing of this package: backends, masks and topologies all stand on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

Correction = Literal["layer", "unnormalized", "none"]


@dataclass(frozen=True)
class Neurons:
    """The dimension of a weight that counts its neurons (output units, the rows of section 3 of the paper).

    ``dim`` is 0 for ``Linear`` and ``Conv*`` weights ``(out, in/groups, *kernel)``. It is 1 for
    ``ConvTranspose*`` weights ``(in, out/groups, *kernel)``, whose dimension 0 is then split in
    ``groups`` parts: neuron ``(g, j)`` is fed by ``weight[g * in/groups : (g + 1) * in/groups, j]``.
    """

    dim: int = 0
    groups: int = 1

    def grid(self, shape: Sequence[int]) -> tuple[int, int, int, int]:
        """``(groups, segments, neurons per group, length)``: a contiguous tensor of ``shape`` reshaped
        to it holds the weights of neuron ``(g, j)`` in ``[g, :, j, :]``."""
        if self.dim == 0:
            count = shape[0] if len(shape) else 1
            return 1, 1, count, prod(shape[1:])
        return self.groups, shape[0] // self.groups, shape[1], prod(shape[2:])

    def count(self, shape: Sequence[int]) -> int:
        """The number of neurons of a weight of that shape."""
        groups, _, per_group, _ = self.grid(shape)
        return groups * per_group


def fan_in(mask: Tensor, neurons: Neurons) -> Tensor:
    """``fan_in_i``, the number of active weights of each neuron: int64, of shape ``(neurons,)``."""
    return mask.reshape(neurons.grid(mask.shape)).count_nonzero(dim=(1, 3)).flatten()


def correction_factors(mask: Tensor, neurons: Neurons, correction: Correction = "layer") -> Tensor:
    """``c_i``, what the gradient of each neuron is multiplied by: float64, broadcasts against the mask.

    ``"layer"`` is Eq. 12, ``sqrt((1 - s_i) / (1 - s_avg)) = sqrt(fan_in_i / mean fan_in)``: exactly 1
    where all neurons have the same fan-in. ``"unnormalized"`` is ``sqrt(1 - s_i)``, the preconditioner D
    of section 4.1 alone. ``"none"`` is 1. An empty neuron of a mask that is not empty gets 0.
    """
    counts = fan_in(mask, neurons).double()
    if correction == "none":
        factors = torch.ones_like(counts)
    else:
        full = mask.numel() / max(1, counts.numel())
        divisor = counts.mean() if correction == "layer" else full
        factors = (counts / divisor).nan_to_num(0.0).sqrt()
    groups, segments, per_group, _ = neurons.grid(mask.shape)
    leading = mask.shape[: neurons.dim + 1]
    factors = factors.view(groups, 1, per_group).expand(groups, segments, per_group).reshape(leading)
    return factors.view(leading + (1,) * (mask.ndim - len(leading)))


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """What numbers of ``dtype`` are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
