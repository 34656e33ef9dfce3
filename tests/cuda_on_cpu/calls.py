"""Calls of the CUDA library with tensors of the CPU, and what they must make of them, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparseopt_kernels.tensor_memory import addresses_of

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
    seed: int = 0
    ham: bool = False
    guards: list[Tensor] = field(default_factory=list)
    p: Tensor = field(init=False)
    g: Tensor = field(init=False)
    b: Tensor = field(init=False)
    mask: Tensor = field(init=False)
    bits: np.ndarray = field(init=False)
    mean_fan_in: Tensor = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        shape = (self.rows, self.columns)
        keep = np.ones(shape, bool) if self.density is None else rng.random(shape) < self.density
        self.mask = torch.from_numpy(keep)
        self.bits = np.packbits(keep, axis=1, bitorder="little")
        self.p, self.g, self.b = (self._draw(rng) for _ in range(3))
        self.p *= self.mask
        self.b *= self.mask
        self.g[~self.mask] = float("nan")  # must not matter
        wide = torch.float64 if self.dtype == "float64" else torch.float32
        self.mean_fan_in = torch.tensor(keep.sum() / max(self.rows, 1), dtype=wide)

    def _draw(self, rng: np.random.Generator) -> Tensor:
        numel = self.rows * self.columns
        memory = torch.full((self.offset + numel + GUARD,), 77.0, dtype=DTYPES[self.dtype])
        self.guards.append(memory[self.offset + numel :])
        view = memory[self.offset : self.offset + numel].view(self.rows, self.columns)
        return view.copy_(torch.from_numpy(rng.standard_normal(view.shape)))

    def tensor(self, cuda: ModuleType) -> Any:
        dense = self.density is None
        return cuda.Tensor(
            dtype=self.dtype,
            parameter=self.p.data_ptr(),
            momentum_buffer=self.b.data_ptr() if self.momentum else 0,
            rows=1 if dense else self.rows,
            columns=self.rows * self.columns if dense else self.columns,
            bits=0 if dense else self.bits.ctypes.data,
            mean_fan_in=0 if dense else self.mean_fan_in.data_ptr(),
            ham=self.ham,
        )

    def scale(self, correction: str) -> Tensor:
        """c_i, a column."""
        fan_in = self.mask.double().sum(1, keepdim=True)
        if self.density is None or correction == "none":
            return torch.ones_like(fan_in)
        divisor = fan_in.mean() if correction == "layer" else torch.tensor(float(self.columns))
        return torch.sqrt(fan_in / divisor).nan_to_num(0.0)

    def expected(self, hyper: Hyper, gamma: float = 1.0) -> tuple[Tensor, Tensor]:
        p, b = self.p.double(), self.b.double()
        g = self.scale(hyper.correction) * gamma * torch.where(self.mask, self.g.double(), 0.0)
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
    correction: str = "layer"
    ham_alpha: float = 0.0
    ham_beta: float = 0.0

    def rule(
        self, cuda: ModuleType, *, lr_address: int = 0, gamma: float = 1.0, gamma_address: int = 0
    ) -> Any:
        return cuda.Rule(**vars(self), lr_address=lr_address, gamma=gamma, gamma_address=gamma_address)


def step(
    cuda: ModuleType,
    weights: Sequence[Weight],
    rules: Sequence[Any],
    *,
    groups: Sequence[int] | None = None,
    grad_scale: int = 0,
    found_inf: int = 0,
) -> int:
    table = cuda.Table([weight.tensor(cuda) for weight in weights], groups or [0] * len(weights))
    return cuda.step(table, addresses(weights), list(rules), grad_scale, found_inf, 0)


def addresses(weights: Sequence[Weight]) -> bytes:
    """Of their gradients."""
    return addresses_of([weight.g for weight in weights])


def assert_near(weight: Weight, expected: tuple[Tensor, Tensor]) -> None:
    assert all((guard == 77).all() for guard in weight.guards), "written behind the tensor"
    eps = max(torch.finfo(weight.p.dtype).eps, 2e-7 if weight.dtype != "float64" else 0.0)
    tolerance = (10 if weight.ham else 2) * eps  # HAM multiplies by exp(5) at most
    torch.testing.assert_close(weight.p.double(), expected[0], rtol=tolerance, atol=4 * tolerance)
    if weight.momentum:
        torch.testing.assert_close(weight.b.double(), expected[1], rtol=tolerance, atol=4 * tolerance)
