"""A parameter of any layout or dtype under the optimizer and the oracle; a masked layer in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from backends import Backend, norm_error
from oracle import Hyper, Layer, Oracle
from rules import FLOATS
from side_by_side import assert_close, pattern_mask, same_bits
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from sparseopt_kernels.masks.mapping import Masks
from sparseopt_kernels.optimizer import SparseOpt

RULE = Hyper(lr=0.1, momentum=0.9, weight_decay=0.01, max_grad_norm=4.0)
each_float = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def optimizer_of(
    backend: Backend, params: Sequence[Tensor], masks: dict[Parameter, Tensor], rule: Hyper = RULE
) -> SparseOpt:
    return SparseOpt(params, **rule.__dict__, masks=masks, backend=backend.name)


class Watched:
    """One parameter under an optimizer and the oracle; the caller arranges its memory in any way."""

    def __init__(
        self, backend: Backend, parameter: Parameter, mask: Tensor | None, rule: Hyper = RULE
    ) -> None:
        self.backend, self.parameter = backend, parameter
        self.masks = {} if mask is None else {parameter: mask}
        self.optimizer = optimizer_of(backend, [parameter], self.masks, rule)
        self.layer = Layer(parameter, mask)
        self.oracle = Oracle([(rule, {"p": self.layer})])
        self.steps = 0

    def step(self, grad: Tensor) -> None:
        """Step with a gradient as it is, layout and all, and compare."""
        self.parameter.grad = grad
        copied = grad.detach().clone()
        if self.parameter in self.masks:
            self.layer.set_mask(self.masks[self.parameter])
        self.optimizer.step()
        self.oracle.step({"p": copied})
        self.steps += 1
        assert same_bits(self.parameter.grad, copied)
        buffer = self.optimizer.state[self.parameter]["momentum_buffer"]
        assert self.layer.b is not None
        real = self.parameter.real.dtype if self.parameter.is_complex() else self.parameter.dtype
        tolerance, error = self.backend.tolerance(real), norm_error([copied])
        assert_close(f"step {self.steps}", self.parameter, self.layer.p, self.layer.p_terms, tolerance, error)
        assert_close(f"step {self.steps}, b", buffer, self.layer.b, self.layer.b_terms, tolerance, error)
        self.resume()

    def resume(self) -> None:
        """Let the oracle go on from what is there."""
        fresh = Layer(self.parameter, None)
        self.layer.p = fresh.p
        buffer = self.optimizer.state[self.parameter].get("momentum_buffer")
        self.layer.b = None if buffer is None else Layer(buffer, None).p


def randn(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_complex:
        return torch.complex(*torch.randn(2, *shape, generator=generator, dtype=torch.float64)).to(dtype)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def random_mask(shape: tuple[int, ...], seed: int = 0, pattern: str = "half") -> Tensor:
    return pattern_mask(pattern, shape, torch.Generator().manual_seed(seed))


class MaskedLinear(nn.Linear):
    weight: Parameter
    weight_mask: Tensor


def masked_layer(seed: int = 0, pattern: str = "sparse99") -> MaskedLinear:
    """A layer sparse enough for a backend to skip most of its memory."""
    layer = MaskedLinear(517, 23, bias=False)
    with torch.no_grad():
        layer.weight.copy_(randn((23, 517), torch.float32, seed))
    layer.register_buffer("weight_mask", random_mask((23, 517), seed, pattern))
    return layer


def give_gradient(layer: nn.Linear, seed: int) -> None:
    layer.weight.grad = randn((23, 517), torch.float32, seed)


def settled(backend: Backend, **kwargs: Any) -> tuple[MaskedLinear, SparseOpt]:
    """A masked layer after three steps: nothing is stale, a backend may skip what it likes."""
    layer = masked_layer()
    common = {"lr": 0.1, "momentum": 0.9} | kwargs
    optimizer = SparseOpt(layer.parameters(), **common, masks=Masks(layer), backend=backend.name)
    for step in range(3):
        give_gradient(layer, step)
        optimizer.step()
    return layer, optimizer
