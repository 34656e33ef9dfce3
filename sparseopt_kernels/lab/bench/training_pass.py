"""A forward and backward pass of the layers of ``bench``, with which the time of a step is compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from .network import Shape


def training_pass(
    layers: Sequence[Shape], batch: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], object] | None:
    """Return a forward and a backward pass of ``Linear`` layers of these shapes, dense as in training.

    Each layer has an input of its own, and the gradients of weights and inputs are computed.

    Args:
        layers: the shapes of the weights, ``(out, in)``.
        batch: the number of examples.
        dtype: of weights and inputs.
        device: of both.

    Returns:
        The pass; None if a shape is a convolution's, whose time depends on the size of the images.
    """
    if any(len(shape) != 2 for shape in layers):
        return None
    weights = [torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for shape in layers]
    inputs = [torch.randn(batch, n, dtype=dtype, device=device, requires_grad=True) for _, n in layers]
    gradients = [torch.randn(batch, m, dtype=dtype, device=device) for m, _ in layers]

    def forward_and_backward() -> tuple[Tensor, ...]:
        outputs = [linear(x, weight) for x, weight in zip(inputs, weights, strict=True)]
        return torch.autograd.grad(outputs, [*weights, *inputs], gradients)

    return forward_and_backward
