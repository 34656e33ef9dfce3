"""Runs an optimizer and the oracle side by side and compares them after every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from backends import Backend, Tolerance, norm_error
from oracle import Hyper, Layer, Oracle, flat
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from sparseopt_kernels.kernels.contract import NormOver
from sparseopt_kernels.masks.mapping import Masks
from sparseopt_kernels.optimizer import SparseOpt

PATTERNS = (
    "full",
    "half",
    "sparse90",
    "sparse99",
    "blocks",
    "single",
    "tail",
    "empty",
    "empty-rows",
    "ramp",
    "homogeneous",
)
CHANGES = ("write", "replace", "write", "empty", "full", "write")
"""What happens to masks on the way, in a run."""


@dataclass(frozen=True)
class Spec:
    """A parameter to test: its shape, type, the pattern of its mask, and whether it is a ConvTranspose."""

    shape: tuple[int, ...]
    pattern: str | None = "half"
    dtype: torch.dtype = torch.float64
    transposed_groups: int | None = None


def pattern_mask(pattern: str, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """A random mask of a kind: each kind reaches another branch of some kernel."""
    mask = torch.zeros(tuple(shape), dtype=torch.bool)
    flat_mask = mask.view(-1)
    size = flat_mask.numel()
    rows = mask.view(shape[0], -1) if len(shape) and size else mask.view(1, -1)
    density = {"half": 0.5, "sparse90": 0.1, "sparse99": 0.01}.get(pattern)
    if density is not None:
        mask.copy_(torch.rand(mask.shape, generator=generator) < density)
    elif pattern == "full":
        mask.fill_(True)
    elif pattern == "blocks":  # whole runs of 16, and nothing between them
        starts = torch.rand(-(-size // 16), generator=generator) < 0.3
        flat_mask.copy_(starts.repeat_interleave(16)[:size])
    elif pattern == "single" and size:
        flat_mask[int(torch.randint(size, (), generator=generator))] = True
    elif pattern == "tail":  # only what follows the last whole block of 16 of each row
        rows[:, rows.shape[1] // 16 * 16 :] = True
    elif pattern == "empty-rows":  # every other neuron has lost all its weights
        mask.copy_(torch.rand(mask.shape, generator=generator) < 0.4)
        rows[::2] = False
    elif pattern == "ramp":  # fan-in from 1 weight to all of them
        columns = torch.arange(rows.shape[1])
        rows.copy_(
            columns * rows.shape[0] <= torch.arange(rows.shape[0]).unsqueeze(1) * max(rows.shape[1], 1)
        )
    elif pattern == "homogeneous":  # as many weights for each neuron, not the same ones
        keep = max(rows.shape[1] // 3, 1)
        for row in rows:
            row[torch.randperm(rows.shape[1], generator=generator)[:keep]] = True
    return mask


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Bitwise equality, so that NaN equals itself and -0.0 is not 0.0."""
    if a.shape != b.shape or a.dtype != b.dtype or a.layout != b.layout:
        return False
    if a.layout is not torch.strided:
        a, b = a.to_dense(), b.to_dense()
    a, b = (t.detach().resolve_conj().resolve_neg().contiguous().reshape(-1) for t in (a, b))
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def assert_close(
    label: str, got: Tensor, want: np.ndarray, terms: np.ndarray, tolerance: Tolerance, error: float = 0.0
) -> None:
    """``|got - want|`` within the roundings of ``terms``, element by element, with the worst one named.

    ``error``: a relative error of the terms that comes on top of their roundings.
    """
    values = flat(got)
    floating = got.real.dtype if got.is_complex() else got.dtype
    subnormal = torch.finfo(floating).smallest_normal * torch.finfo(floating).eps
    allowed = (tolerance.arithmetic_eps * tolerance.roundings + error) * terms
    allowed = allowed + tolerance.storage * (np.abs(want) + allowed) + subnormal
    bad = ~(np.abs(values - want) <= allowed)  # catches NaN
    if bad.any():
        excess = np.abs(values - want) - allowed
        at = int(np.argmax(np.where(bad, np.nan_to_num(excess, nan=np.inf), -np.inf)))
        raise AssertionError(
            f"{label}: {int(bad.sum())} of {len(bad)} elements differ from the oracle; the worst, at flat "
            f"index {at} of shape {tuple(got.shape)}, is {values[at]!r}, it must be {want[at]!r} "
            f"+- {allowed[at]:.3g}"
        )


def assert_rounds_every_number(backend: Backend, dtype: torch.dtype, lr: float, pattern: str | None) -> None:
    """From p = 0, a step with each of the 65536 numbers of a half precision as gradient gives ``-lr * g``,
    rounded to float32 and then to the parameter's type."""
    grad = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype).view(64, 1024)
    mask = torch.ones(64, 1024, dtype=torch.bool)
    if pattern is not None:
        mask = pattern_mask(pattern, grad.shape, torch.Generator().manual_seed(0))
    p = Parameter(torch.zeros(64, 1024, dtype=dtype, device=backend.device))
    p.grad = grad.to(backend.device, copy=True)
    masks = {} if pattern is None else {p: mask.to(backend.device)}
    SparseOpt([p], lr=lr, masks=masks, correction="none", backend=backend.name).step()
    want = torch.where(mask, (grad.float() * -lr).to(dtype), 0.0)
    torch.testing.assert_close(p.detach().cpu(), want, rtol=0.0, atol=0.0, equal_nan=True)


class SideBySide:
    """An optimizer over parameters made from ``specs``, and the oracle over copies of them.

    ``rules``: the hyperparameters of each group; parameter ``i`` belongs to group ``i % len(rules)``.
    ``through_model``: the masks are buffers of modules, seen through ``Masks``, not a plain dict.
    ``threads``: for the optimizer's step. ``norm_over``: its ``max_grad_norm_over``.
    """

    def __init__(
        self,
        backend: Backend,
        specs: Sequence[Spec],
        rules: Sequence[Hyper] = (Hyper(),),
        *,
        seed: int = 0,
        through_model: bool = False,
        threads: int = 1,
        norm_over: NormOver = "active",
    ) -> None:
        self.backend = backend
        self.device = backend.device
        self.specs = {f"layer{i}": spec for i, spec in enumerate(specs)}
        self.generator = torch.Generator().manual_seed(seed)
        self.model = nn.Module()
        self.params: dict[str, Parameter] = {}
        self._dict: dict[Parameter, Tensor] = {}
        self.steps = 0
        self.threads = threads
        for name, spec in self.specs.items():
            module = _module_for(spec)
            module.weight = self.params[name] = Parameter(self.random(spec.shape, spec.dtype).to(self.device))
            self.model.add_module(name, module)
            if spec.pattern is not None:
                self._dict[module.weight] = self.new_mask(name)
                module.register_buffer("weight_mask", self._dict[module.weight])
        self.through_model = through_model or any(s.transposed_groups is not None for s in specs)
        has_masks = any(s.pattern is not None for s in specs)
        self.masks: Mapping[Parameter, Tensor] = (
            Masks(self.model) if self.through_model and has_masks else self._dict
        )
        names = list(self.params)
        members = [names[i :: len(rules)] for i in range(len(rules))]
        self.optimizer = SparseOpt(
            [
                {"params": [self.params[n] for n in group], **asdict(rule)}
                for group, rule in zip(members, rules, strict=True)
            ],
            masks=self.masks,
            max_grad_norm_over=norm_over,
            backend=backend.name,
        )
        self.oracle = Oracle(
            [
                (
                    rule,
                    {n: Layer(self.params[n], self.mask(n), self.specs[n].transposed_groups) for n in group},
                )
                for group, rule in zip(members, rules, strict=True)
            ],
            norm_over,
        )

    def random(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.randn(tuple(shape), generator=self.generator, dtype=torch.float64).to(dtype)

    def new_mask(self, name: str, pattern: str | None = None) -> Tensor:
        spec = self.specs[name]
        assert spec.pattern is not None
        return pattern_mask(pattern or spec.pattern, spec.shape, self.generator).to(self.device)

    def mask(self, name: str) -> Tensor | None:
        return self.masks.get(self.params[name])

    def write_mask(self, name: str, new: Tensor) -> None:
        """Change a mask in place; nothing but the tensor is touched."""
        mask = self.mask(name)
        assert mask is not None
        mask.copy_(new)
        self.oracle.layers()[name].set_mask(new)

    def replace_mask(self, name: str, new: Tensor) -> None:
        """Put another tensor in the place of a mask."""
        if self.through_model:
            self.model.get_submodule(name).weight_mask = new
        else:
            self._dict[self.params[name]] = new
        self.oracle.layers()[name].set_mask(new)

    def random_grads(self, grad_scale: float = 1.0) -> dict[str, Tensor]:
        return {n: self.random(s.shape, s.dtype) * grad_scale for n, s in self.specs.items()}

    def step(
        self,
        grads: Mapping[str, Tensor] | None = None,
        grad_scale: float | None = None,
        found_inf: float | None = None,
    ) -> None:
        """Step both, and compare every parameter, momentum buffer and gradient."""
        grads = self.random_grads(grad_scale or 1.0) if grads is None else grads
        for name, parameter in self.params.items():
            parameter.grad = grads[name].to(self.device, copy=True) if name in grads else None
        if grad_scale is not None:
            self.optimizer.__dict__["grad_scale"] = torch.tensor(grad_scale, device=self.device)
        if found_inf is not None:
            self.optimizer.__dict__["found_inf"] = torch.tensor(found_inf, device=self.device)
        torch.set_num_threads(self.threads)
        self.optimizer.step()
        torch.set_num_threads(1)
        for attribute in ("grad_scale", "found_inf"):
            self.optimizer.__dict__.pop(attribute, None)
        self.oracle.step(dict(grads), grad_scale or 1.0, found_inf or 0.0)
        self.steps += 1
        for name, grad in grads.items():
            own = self.params[name].grad
            assert own is not None
            assert same_bits(own.cpu(), grad), f"step {self.steps}: {name}.grad written"
        for rule, layers in self.oracle.groups:
            self._compare(layers, 0.0 if rule.max_grad_norm is None else norm_error(grads.values()))

    def _compare(self, layers: Mapping[str, Layer], error: float) -> None:
        """Check p and b against the oracle, then let it go on from what the backend has rounded."""
        for name, layer in layers.items():
            parameter = self.params[name]
            real = parameter.real.dtype if parameter.is_complex() else parameter.dtype
            tolerance = self.backend.tolerance(real)
            label = f"step {self.steps}, {name}"
            assert_close(f"{label}, parameter", parameter, layer.p, layer.p_terms, tolerance, error)
            buffer = self.optimizer.state.get(parameter, {}).get("momentum_buffer")
            if self.backend.on_device and layer.b is None and buffer is not None:
                assert not buffer.any(), f"{label}: momentum before the first step"
                buffer = None
            assert (buffer is None) == (layer.b is None), f"{label}: {buffer=}, oracle has {layer.b=}"
            mask = layer.mask if layer.updated else None
            if mask is not None:
                assert not flat(parameter)[~mask].any(), f"{label}: weight outside the mask"
            layer.p = flat(parameter)
            if buffer is not None and layer.b is not None:
                assert_close(f"{label}, momentum_buffer", buffer, layer.b, layer.b_terms, tolerance, error)
                if mask is not None:
                    assert not flat(buffer)[~mask].any(), f"{label}: momentum outside the mask"
                layer.b = flat(buffer)

    def run(self, grad_scale: float | None = None) -> None:
        """Steps with masks that are written in place and replaced on the way: 20, or 6 where each takes
        long."""
        masked = [n for n, s in self.specs.items() if s.pattern is not None]
        slow = self.backend.is_slow
        self.step(grad_scale=grad_scale)
        for change in ("replace", "empty", "full", "write") if slow else CHANGES:
            for _ in range(0 if slow else 2):
                self.step(grad_scale=grad_scale)
            if change == "write":
                for name in masked:
                    self.write_mask(name, self.new_mask(name))
            elif change == "replace":
                for name in masked[:1]:
                    self.replace_mask(name, self.new_mask(name))
            else:
                for name in masked[-1:]:
                    self.write_mask(name, self.new_mask(name, change))
            self.step(grad_scale=grad_scale)
        self.step(grad_scale=grad_scale)


def _module_for(spec: Spec) -> nn.Module:
    if spec.transposed_groups is None:
        return nn.Module()
    kinds: dict[int, Any] = {3: nn.ConvTranspose1d, 4: nn.ConvTranspose2d, 5: nn.ConvTranspose3d}
    inputs, outputs, *kernel = spec.shape
    return kinds[len(spec.shape)](
        inputs,
        outputs * spec.transposed_groups,
        tuple(kernel),
        groups=spec.transposed_groups,
        bias=False,
        device="meta",
    )
