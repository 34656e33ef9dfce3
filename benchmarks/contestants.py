"""The ways to take one step that are measured against each other, on the same shapes.

Each contestant is made of fresh parameters, and has a function ``step`` (what is timed) and one
``prepare`` (what is not: it restores what a step used up).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from sparseopt_kernels import SparseOpt
from sparseopt_kernels.layers import Neurons
from sparseopt_kernels.masks import correction_factors

LR, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-4


@dataclass
class Network:
    """Parameters with gradients, and masks for those of two and more dimensions."""

    parameters: list[Parameter]
    masks: dict[Parameter, Tensor]
    gradients: list[Tensor] = field(default_factory=list)

    @classmethod
    def of_shapes(cls, shapes: Sequence[tuple[int, ...]], sparsity: float) -> Network:
        generator = torch.Generator().manual_seed(0)
        parameters = [Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        masks = {p: torch.rand(p.shape, generator=generator) >= sparsity for p in parameters if p.ndim > 1}
        with torch.no_grad():
            for p, mask in masks.items():
                p.mul_(mask)
        gradients = [torch.randn(shape, generator=generator) for shape in shapes]
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient.clone()
        return cls(parameters, masks, gradients)

    def numel(self) -> int:
        return sum(p.numel() for p in self.parameters)

    def floor_bytes(self) -> int:
        """What a perfect implementation touches in a step: p and b read and written and g read, in the
        64-byte cache lines that hold an active weight, and the mask as bits."""
        touched = 0
        for p in self.parameters:
            mask = self.masks.get(p)
            if mask is None:
                touched += 5 * p.numel() * p.element_size()
                continue
            lines = mask.flatten()
            lines = torch.nn.functional.pad(lines, (0, -lines.numel() % 16)).view(-1, 16).any(dim=1)
            touched += 5 * 64 * int(lines.count_nonzero()) + mask.numel() // 8
        return touched


@dataclass
class Contestant:
    name: str
    network: Network
    step: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


def sparseopt(network: Network, backend: str = "auto") -> Contestant:
    """This package: correction, masks and update in one pass."""
    optimizer = SparseOpt(
        network.parameters,
        lr=LR,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        masks=network.masks,
        backend=backend,
    )
    return Contestant("sparseopt", network, optimizer.step)


def sgd_fused(network: Network) -> Contestant:
    """PyTorch's fused SGD on dense weights: no mask and no correction, less work than asked for."""
    optimizer = _sgd(network, fused=True)
    return Contestant("sgd fused, no mask", network, optimizer.step)


def eager_chain(network: Network) -> Contestant:
    """What one writes without this package: scale and mask the gradients, step, mask the weights."""
    return Contestant("eager chain", network, _chain(network), lambda: _restore_gradients(network))


def compiled_chain(network: Network) -> Contestant:
    """The same chain, optimizer included, under ``torch.compile``."""
    step = torch.compile(_chain(network))
    return Contestant("torch.compile of the chain", network, step, lambda: _restore_gradients(network))


def compiled_function(network: Network) -> Contestant:
    """The chain written anew as one function of tensors, for ``torch.compile`` to fuse as best it can:
    no optimizer object, gradients not written, weights and momentum masked where they are computed."""
    factors = _factors(network)
    buffers = [torch.zeros_like(p) for p in network.parameters]
    masks = [network.masks.get(p) for p in network.parameters]
    scales = [factors.get(p) for p in network.parameters]
    weights = [p.detach() for p in network.parameters]

    @torch.compile(fullgraph=True)
    def update(gradients: list[Tensor]) -> None:
        for p, g, b, mask, scale in zip(weights, gradients, buffers, masks, scales, strict=True):
            d = (g if scale is None else g * scale) + WEIGHT_DECAY * p
            b_new = MOMENTUM * b + d
            p_new = p - LR * b_new
            b.copy_(b_new if mask is None else torch.where(mask, b_new, 0.0))
            p.copy_(p_new if mask is None else torch.where(mask, p_new, 0.0))

    @torch.no_grad()
    def step() -> None:
        update([p.grad for p in network.parameters])  # type: ignore[misc]

    return Contestant("torch.compile of one function", network, step)


def _chain(network: Network) -> Callable[[], None]:
    """The factors c_i are computed once, as one would between two changes of the masks."""
    optimizer = _sgd(network, foreach=True)
    factors = _factors(network)

    @torch.no_grad()
    def step() -> None:
        for p, mask in network.masks.items():
            assert p.grad is not None
            p.grad.mul_(factors[p]).mul_(mask)
        optimizer.step()
        for p, mask in network.masks.items():
            p.mul_(mask)

    return step


def _sgd(network: Network, **implementation: bool) -> torch.optim.SGD:
    return torch.optim.SGD(
        network.parameters, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, **implementation
    )


def _factors(network: Network) -> dict[Parameter, Tensor]:
    return {p: correction_factors(mask, Neurons()).to(p.dtype) for p, mask in network.masks.items()}


def _restore_gradients(network: Network) -> None:
    for p, gradient in zip(network.parameters, network.gradients, strict=True):
        assert p.grad is not None
        p.grad.copy_(gradient)
