"""Eq. 12: from the fan-in of neurons to ``c_i``, the factor on the gradient of each.

Backends count fan-in, and are handed the factors that are computed here. Only a kernel that counts and
updates in one pass computes them itself, from a divisor that it is handed: ``correction_factor`` of
``csrc/update_rule.h`` and of ``kernels/gpu/triton_update_rule.py``.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .neurons import Neurons, fan_in

Correction = Literal["layer", "unnormalized", "none"]


class FanIn(NamedTuple):
    """The fan-in of the neurons of some layers, which are on one device."""

    counts: Tensor
    """The number of active weights of each neuron, layer after layer: of the floating-point type that the
    factors are to have."""
    neurons: Tensor
    """The number of neurons of each layer: integers."""
    full: Tensor
    """What fan-in would be without a mask: integers, of each layer."""
    mean: Tensor | None = None
    """The mean fan-in of each layer, float64, where ``counts`` has only a part of its neurons."""


class Factors(NamedTuple):
    """``c_i = sqrt(fan_in_i / divisor)`` of one layer or of several, of the type of the counts."""

    c: Tensor
    """For each neuron, of shape ``(neurons,)``. It is 1 where fan-in is the divisor, and 0 without active
    weights."""
    divisor: Tensor
    """For each layer, and 0-d for one: for kernels that count fan-in as they update. It is never 0."""


def correction_factors(fan_in: FanIn, correction: Literal["layer", "unnormalized"]) -> Factors:
    """Compute ``c_i``. Nothing waits for the device.

    ``"layer"`` is Eq. 12, ``sqrt((1 - s_i) / (1 - s_avg))``: the divisor is the mean fan-in of the layer, or
    1 where it has no active weight. ``"unnormalized"`` is ``sqrt(1 - s_i)``, the preconditioner D of section
    4.1 alone: the divisor is the full fan-in.
    """
    layer = torch.repeat_interleave(fan_in.neurons, output_size=fan_in.counts.numel())
    if correction == "unnormalized":
        divisor = fan_in.full.double()
    elif fan_in.mean is not None:
        divisor = fan_in.mean
    else:
        zeros = torch.zeros_like(fan_in.neurons, dtype=torch.float64)
        divisor = zeros.index_add_(0, layer, fan_in.counts.double()) / fan_in.neurons
    divisor = divisor.masked_fill(~(divisor > 0), 1.0).to(fan_in.counts.dtype)
    return Factors(_sqrt(fan_in.counts / divisor.index_select(0, layer)), divisor)


def _sqrt(square: Tensor) -> Tensor:
    """Return square roots, rounded to the nearest, as those of kernels are.

    On a CPU, PyTorch's vectors are off by one unit of the last place now and then, which depends on the place
    in the tensor.
    """
    if square.device.type != "cpu":
        return square.sqrt()
    x = square.double()
    root = x.sqrt()
    if square.dtype != torch.float64:
        return root.to(square.dtype)  # no root of a float32 is so near to the middle between two of them
    high = root.float().double()
    low = root - high
    error = (x - high * high) - 2 * high * low - low * low
    return root + error / (2 * root).clamp_min(1e-300)


def mask_factors(
    mask: Tensor, neurons: Neurons, correction: Correction = "layer", mean_fan_in: float | None = None
) -> Tensor:
    """Compute ``c_i`` of one boolean mask: float64, of a shape that broadcasts against it.

    ``mean_fan_in`` is given where the mask has only a part of the layer's neurons.
    """
    counts = fan_in(mask, neurons).double()
    if correction == "none":
        return neurons.broadcast(torch.ones_like(counts), mask.shape)
    count, full = torch.tensor(neurons.sizes(mask.shape), device=mask.device).view(2, 1)
    mean = None if mean_fan_in is None else torch.full_like(count, mean_fan_in, dtype=torch.float64)
    layer = FanIn(counts=counts, neurons=count, full=full, mean=mean)
    return neurons.broadcast(correction_factors(layer, correction).c, mask.shape)
