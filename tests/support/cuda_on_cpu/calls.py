"""Calls of the CUDA library with tensors of the CPU, and what they must make of them, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from sparseopt_kernels.correction import Correction
from sparseopt_kernels.kernels.contract import Inputs, ParamState, Rule
from sparseopt_kernels.kernels.gpu import cuda as backend
from sparseopt_kernels.kernels.gpu.plan import GpuPlan
from sparseopt_kernels.kernels.tensor_memory import addresses_of
from sparseopt_kernels.neurons import Neurons
from sparseopt_kernels.step.factors import Corrected, with_factors

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
GUARD = 8  # weights behind each tensor that nobody may write


@dataclass
class Weight:
    """A parameter, its gradient and so on, as the library sees it, and what a step must make of it."""

    dtype: str = "float32"
    rows: int = 30
    columns: int = 100
    density: float | None = 0.2
    momentum: bool = True
    offset: int = 0  # of the memory from an aligned address, in weights
    gradient_offset: int | None = None  # of the gradient's; None: the same
    seed: int = 0
    ham: bool = False
    rule: int = 0
    correction: Correction = "layer"
    guards: list[Tensor] = field(default_factory=list)
    p: Tensor = field(init=False)
    g: Tensor = field(init=False)
    b: Tensor = field(init=False)
    mask: Tensor = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        shape = (self.rows, self.columns)
        keep = np.ones(shape, bool) if self.density is None else rng.random(shape) < self.density
        gradient_offset = self.offset if self.gradient_offset is None else self.gradient_offset
        self.p, self.g, self.b = (self._draw(rng, at) for at in (self.offset, gradient_offset, self.offset))
        self.apply(torch.from_numpy(keep))

    def apply(self, mask: Tensor) -> None:
        """Outside of a mask, weights and momenta are 0."""
        self.mask = mask
        self.p[~mask] = self.b[~mask] = 0.0
        self.g[~mask] = float("nan")  # must not matter

    def _draw(self, rng: np.random.Generator, offset: int) -> Tensor:
        numel = self.rows * self.columns
        memory = torch.full((offset + numel + GUARD,), 77.0, dtype=DTYPES[self.dtype])
        self.guards.append(memory[offset + numel :])
        view = memory[offset : offset + numel].view(self.rows, self.columns)
        return view.copy_(torch.from_numpy(rng.standard_normal(view.shape)))

    def param(self) -> ParamState:
        return ParamState(
            parameter=self.p,
            momentum_buffer=self.b if self.momentum else None,
            mask=None if self.density is None else self.mask,
            given_mask=None,
            gradient_dtype=self.g.dtype,
            dim_order=None,
            neurons=Neurons(),
            rule=self.rule,
            ham=self.ham,
        )

    def results(self) -> tuple[Tensor, Tensor]:
        """The bits of what a step writes."""
        size = {2: torch.int16, 4: torch.int32, 8: torch.int64}[self.p.itemsize]
        return self.p.view(size), self.b.view(size)

    def scale(self) -> Tensor:
        """c_i, a column."""
        fan_in = self.mask.double().sum(1, keepdim=True)
        if self.density is None or self.correction == "none":
            return torch.ones_like(fan_in)
        divisor = fan_in.mean() if self.correction == "layer" else torch.tensor(float(self.columns))
        return torch.sqrt(fan_in / divisor).nan_to_num(0.0)

    def expected(self, hyper: Hyper, gamma: float = 1.0) -> tuple[Tensor, Tensor]:
        p, b = self.p.double(), self.b.double()
        g = self.scale() * gamma * torch.where(self.mask, self.g.double(), 0.0)
        g = -g if hyper.maximize else g
        d = g + hyper.weight_decay * p
        u = d
        if self.momentum:
            b = hyper.momentum * b + (1 - hyper.dampening) * d
            u = d + hyper.momentum * b if hyper.nesterov else b
        p = p - hyper.lr * u
        if self.ham:
            exponent = -hyper.lr * (hyper.ham_alpha * p.sign() * g + hyper.ham_beta)
            p = p * exponent.clamp(-5, 5).exp()
        return p * self.mask, b * self.mask


@dataclass(frozen=True)
class Hyper:
    lr: float = 0.1
    momentum: float = 0.9
    dampening: float = 0.25
    weight_decay: float = 0.01
    nesterov: bool = False
    maximize: bool = False
    ham_alpha: float = 0.0
    ham_beta: float = 0.0

    def rule(self, *, lr: float | Tensor | None = None, gamma: float | Tensor = 1.0) -> Rule:
        return Rule(**{**vars(self), "lr": self.lr if lr is None else lr}, gamma=gamma)


def plan_of(weights: Sequence[Weight], *, by_sectors: bool) -> GpuPlan:
    """A plan of the CUDA backend, which must be what ``loaded`` has made it. ``by_sectors``: as if a step had
    been made with these masks, so that sectors are by_sectors, and not neurons."""
    cuda = backend.Cuda()
    params = [weight.param() for weight in weights]
    parameters = [Parameter(weight.p) for weight in weights]
    corrected = [
        Corrected(param, cuda, weight.correction, parameter, name="weight", is_clipped=False)
        for param, parameter, weight in zip(params, parameters, weights, strict=True)
        if param.mask is not None and weight.correction != "none" and weight.p.numel() > 0
    ]
    known = with_factors(corrected, {}, warned={*parameters})
    factors = [known.get(param) for param in params]
    plan = cuda.plan(params, factors)
    if by_sectors:
        for listed in plan._listed:
            listed.forget_mask()
        plan = cuda.plan(params, factors)
    return plan


def loaded(library: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CUDA backend be that build of the library."""
    monkeypatch.setattr(backend, "_cuda", library, raising=False)


def step(
    weights: Sequence[Weight],
    rules: Sequence[Rule],
    *,
    by_sectors: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    plan_of(weights, by_sectors=by_sectors).step(inputs_of(weights, rules, grad_scale, found_inf))


def squared_norm(weights: Sequence[Weight], rules: Sequence[Rule]) -> float:
    return float(plan_of(weights, by_sectors=True).squared_norm(inputs_of(weights, rules), "active"))


def inputs_of(
    weights: Sequence[Weight],
    rules: Sequence[Rule],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> Inputs:
    gradients = [weight.g for weight in weights]
    return Inputs(gradients, addresses_of(gradients), rules, grad_scale, found_inf)


def assert_near(weight: Weight, expected: tuple[Tensor, Tensor]) -> None:
    assert all((guard == 77).all() for guard in weight.guards), "written behind the tensor"
    eps = max(torch.finfo(weight.p.dtype).eps, 2e-7 if weight.dtype != "float64" else 0.0)
    tolerance = (10 if weight.ham else 2) * eps  # HAM multiplies by exp(5) at most
    torch.testing.assert_close(weight.p.double(), expected[0], rtol=tolerance, atol=4 * tolerance)
    if weight.momentum:
        torch.testing.assert_close(weight.b.double(), expected[1], rtol=tolerance, atol=4 * tolerance)
