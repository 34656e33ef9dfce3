"""Parameters with a gradient, of which some have a mask, for optimizers that need no network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.parameter import Parameter


def parameters_and_masks(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32
) -> tuple[list[Parameter], dict[Parameter, Tensor]]:
    """Weights with a mask, all others without, all with a gradient."""
    parameters = [Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    move_gradients(parameters)
    return parameters, {p: torch.ones(p.shape, dtype=torch.bool) for p in parameters if p.ndim > 1}


def move_gradients(parameters: Sequence[Parameter]) -> list[Tensor | None]:
    """Gradients of 1. What it returns is the memory they were in, so that they cannot be there again."""
    before = [p.grad for p in parameters]
    for p in parameters:
        p.grad = torch.ones_like(p)
    return before
