"""What SparseOpt computes, in float64, from the formulas alone: the oracle of the numerical tests.

Written to be compared with the formulas by eye, one neuron at a time, and independent of the package:
nothing of it is imported here. A parameter is a flat array in logical order; complex numbers are pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Hyper:
    """The hyperparameters of one group, with the defaults of the constructor."""

    lr: float = 1e-3
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False
    correction: str = "layer"
    ham_alpha: float = 0.0
    ham_beta: float = 0.0
    max_grad_norm: float | None = None


def flat(tensor: Tensor) -> np.ndarray:
    """All elements in logical (row-major) order, whatever the memory format, in float64."""
    values = tensor.detach()
    if values.layout is not torch.strided:
        values = values.to_dense()
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    return values.to("cpu", torch.float64).contiguous().reshape(-1).numpy().copy()


def rows_of(shape: tuple[int, ...], transposed_groups: int | None) -> list[np.ndarray]:
    """For each neuron, the flat indices of the weights that feed it."""
    index = np.arange(math.prod(shape)).reshape(shape)
    if transposed_groups is None:  # Linear, Conv: (out, in / groups, *kernel)
        return [index[i].reshape(-1) for i in range(shape[0])] if shape else [index.reshape(-1)]
    rows = []  # ConvTranspose: (in, out / groups, *kernel)
    inputs = shape[0] // transposed_groups
    for group in range(transposed_groups):
        for j in range(shape[1]):
            rows.append(index[group * inputs : (group + 1) * inputs, j].reshape(-1))
    return rows


def row_factors(fan_in: list[int], columns: int, correction: str) -> list[float]:
    """c_i of each row: Eq. 12, the preconditioner D alone, or 1."""
    if correction == "none":
        return [1.0 for _ in fan_in]
    if correction == "unnormalized":
        return [math.sqrt(n / columns) if columns else 0.0 for n in fan_in]
    nnz = sum(fan_in)
    return [math.sqrt(n * len(fan_in) / nnz) if n else 0.0 for n in fan_in]


class Layer:
    """One parameter, its momentum and its mask, and how large the terms of its last update were."""

    def __init__(self, value: Tensor, mask: Tensor | None, transposed_groups: int | None = None) -> None:
        self.shape = tuple(value.shape)
        self.ham = value.ndim >= 2
        self.width = 2 if value.is_complex() else 1
        self.rows = rows_of(self.shape, transposed_groups)
        self.p = flat(value)
        self.b: np.ndarray | None = None
        self._had_gradient = False
        self.set_mask(mask)
        self.forget_update()

    def forget_update(self) -> None:
        """Before a step: unless it is updated, a layer must stay as it is, bit for bit."""
        self.updated = False
        self.p_terms = self.b_terms = np.zeros_like(self.p)

    def set_mask(self, mask: Tensor | None) -> None:
        self.mask = None if mask is None else np.repeat(flat(mask) != 0, self.width)
        self._mask_is_new = True
        self._factors: dict[str, np.ndarray] = {}

    def factors(self, correction: str) -> np.ndarray:
        """c_i for each element of the parameter."""
        if correction not in self._factors:
            self._factors[correction] = self._count(correction)
        return self._factors[correction]

    def _count(self, correction: str) -> np.ndarray:
        c = np.ones(len(self.p) // self.width)
        if self.mask is not None:
            active = self.mask[:: self.width]
            fan_in = [int(np.count_nonzero(active[row])) for row in self.rows]
            columns = len(self.rows[0]) if self.rows else 0
            for row, factor in zip(self.rows, row_factors(fan_in, columns, correction), strict=True):
                c[row] = factor
        return np.repeat(c, self.width)

    def masked(self, values: np.ndarray) -> np.ndarray:
        return values if self.mask is None else np.where(self.mask, values, 0.0)

    def apply_new_mask(self, has_gradient: bool) -> None:
        """What a change of mask does at the next step, whether or not there is a gradient then, or AMP skips
        the step; but a layer that never had one is left alone."""
        self._had_gradient |= has_gradient
        if self._mask_is_new and self.mask is not None and self._had_gradient:
            self.p = self.masked(self.p)
            self.b = None if self.b is None else self.masked(self.b)
        self._mask_is_new = False

    def corrected(self, grad: Tensor, correction: str) -> np.ndarray:
        """c_i * g, also where the weight is masked."""
        with np.errstate(all="ignore"):
            return self.factors(correction) * flat(grad)

    def update(self, g: np.ndarray, rule: Hyper) -> None:
        """One step, from the corrected and scaled gradient ``g`` (g' of the formulas, maximize included)."""
        eta, mu, tau, lam = rule.lr, rule.momentum, rule.dampening, rule.weight_decay
        p = self.masked(self.p)
        d = g + lam * p
        d_terms = np.abs(g) + lam * np.abs(p)
        u, u_terms = d, d_terms
        if mu != 0.0:
            if self.b is None:
                b, b_terms = d, d_terms
            else:
                former = self.masked(self.b)
                b = mu * former + (1.0 - tau) * d
                b_terms = mu * np.abs(former) + abs(1.0 - tau) * d_terms
            u, u_terms = (d + mu * b, d_terms + mu * b_terms) if rule.nesterov else (b, b_terms)
            self.b, self.b_terms = self.masked(b), b_terms
        h = p - eta * u
        terms = np.abs(p) + eta * u_terms
        if self.ham and (rule.ham_alpha != 0.0 or rule.ham_beta != 0.0):
            exponent = -eta * (rule.ham_alpha * np.sign(h) * g + rule.ham_beta)
            # Where rounding decides the sign of h, either sign is right: allow the larger factor.
            either = np.abs(h) <= 1e-5 * terms
            growth = np.exp(np.where(either, np.minimum(np.abs(exponent), 5.0), np.clip(exponent, -5.0, 5.0)))
            terms = terms * growth * (1.0 + np.minimum(np.abs(exponent), 6.0))
            h = h * np.exp(np.clip(exponent, -5.0, 5.0))
        self.p, self.p_terms = self.masked(h), terms
        self.updated = True


class Oracle:
    """The layers of an optimizer by name, in groups with their own hyperparameters."""

    def __init__(self, groups: list[tuple[Hyper, dict[str, Layer]]], norm_over: str = "active") -> None:
        self.groups = groups
        self.norm_over = norm_over

    def layers(self) -> dict[str, Layer]:
        return {name: layer for _, layers in self.groups for name, layer in layers.items()}

    def step(self, grads: dict[str, Tensor], grad_scale: float = 1.0, found_inf: float = 0.0) -> None:
        """Update the layers that have an entry in ``grads``."""
        for layer in self.layers().values():
            layer.forget_update()
        for name, layer in self.layers().items():
            layer.apply_new_mask(name in grads)
        if found_inf != 0.0:
            return
        corrected = {
            name: layer.corrected(grads[name], rule.correction) / grad_scale
            for rule, layers in self.groups
            for name, layer in layers.items()
            if name in grads
        }
        masked = {name: self.layers()[name].masked(g) for name, g in corrected.items()}
        counted = corrected if self.norm_over == "dense" else masked
        norm = math.sqrt(sum(float(np.sum(g * g)) for g in counted.values()))
        for rule, layers in self.groups:
            limit = rule.max_grad_norm
            coefficient = 1.0 if limit is None else 1.0 / max(norm / limit, 1.0)
            sign = -1.0 if rule.maximize else 1.0
            for name, layer in layers.items():
                if name in grads:
                    layer.update(sign * coefficient * masked[name], rule)
