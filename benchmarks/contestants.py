"""The ways to take one step that are measured against each other, on the same shapes.

Each contestant is made of fresh parameters, and has a function ``step`` (what is timed) and one
``prepare`` (what is not: it restores what a step used up). Before one is timed, it must agree with the
reference backend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from networks import Shape, floor_bytes
from torch import Tensor
from torch.nn.parameter import Parameter

from sparseopt_kernels import SparseOpt, layer_densities
from sparseopt_kernels.neurons import Neurons, correction_factors
from sparseopt_kernels.timing import Turn
from sparseopt_kernels.topology.densities import Distribution

LR, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-4
WARMUP_STEPS = 5  # before the weights are compared, and the first step is timed
# How far weights may be from the reference's then, by dtype: some roundings of each step.
_TOLERANCES = {
    torch.float64: (1e-9, 1e-10),
    torch.float32: (1e-4, 1e-5),
    torch.float16: (5e-3, 5e-3),
    torch.bfloat16: (4e-2, 4e-2),
}


@dataclass
class Network:
    """Parameters with gradients, and masks for those of two and more dimensions.

    ``p.grad`` is the tensor in ``gradients``: who writes gradients makes their own first.
    """

    parameters: list[Parameter]
    masks: dict[Parameter, Tensor]
    gradients: list[Tensor]

    @classmethod
    def of_shapes(
        cls,
        shapes: Sequence[Shape],
        sparsity: float,
        distribution: Distribution = "uniform",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Network:
        generator = torch.Generator(device).manual_seed(0)

        def random(shape: Shape) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        weights = [random(shape) for shape in shapes]
        masked = {str(i): shape for i, shape in enumerate(shapes) if len(shape) > 1}
        masks: list[Tensor | None] = [None] * len(shapes)
        for i, density in layer_densities(masked, sparsity, distribution).items():
            weight = weights[int(i)]
            mask = torch.rand(weight.shape, generator=generator, device=device) >= 1 - density
            masks[int(i)] = mask
            weight.mul_(mask)
        gradients = [random(shape) for shape in shapes]
        return cls._of(weights, masks, gradients)

    @classmethod
    def _of(
        cls, weights: Sequence[Tensor], masks: Sequence[Tensor | None], gradients: list[Tensor]
    ) -> Network:
        parameters = [Parameter(weight) for weight in weights]
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        found = {p: mask for p, mask in zip(parameters, masks, strict=True) if mask is not None}
        return cls(parameters, found, gradients)

    def copy(self) -> Network:
        """The same with weights of its own; masks and gradients are shared."""
        weights = [p.detach().clone() for p in self.parameters]
        return self._of(weights, [self.masks.get(p) for p in self.parameters], self.gradients)

    def own_gradients(self) -> None:
        """Give the parameters copies of the gradients."""
        for p, gradient in zip(self.parameters, self.gradients, strict=True):
            p.grad = gradient.clone()

    def numel(self) -> int:
        return sum(p.numel() for p in self.parameters)


@dataclass
class Contestant:
    name: str
    network: Network
    step: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    steps_made: int = 0  # before it was handed over
    has_masks: bool = True

    def turn(self, steps: int = 1) -> Turn:
        return Turn(self.step, self.prepare, steps)

    def floor_bytes(self, line: int) -> int:
        """What a perfect implementation of what it does touches: without a mask, all of the network."""
        masks = self.network.masks if self.has_masks else {}
        return sum(floor_bytes(p, masks.get(p), line) for p in self.network.parameters)

    def warm_up(self) -> None:
        """Make ``WARMUP_STEPS`` steps in all."""
        for _ in range(WARMUP_STEPS - self.steps_made):
            self.prepare()
            self.step()
        if self.network.parameters[0].is_cuda:
            torch.cuda.synchronize()  # errors of the device are this contestant's

    def check(self, want: Sequence[Tensor]) -> None:
        """Raise ``AssertionError`` unless its weights are close to ``want``. Without masks, anything goes."""
        for p, q in zip(self.network.parameters, want, strict=True):
            if self.has_masks:
                rtol, atol = _TOLERANCES[p.dtype]
                torch.testing.assert_close(p.detach(), q, rtol=rtol, atol=atol)


def reference_weights(network: Network, **options: Any) -> list[Tensor]:
    """What the weights of ``network``, which becomes the reference's, are after a warm-up."""
    reference = sparseopt(network, backend="reference", **options)
    reference.warm_up()
    return [p.detach() for p in reference.network.parameters]


def sparseopt(network: Network, backend: str = "auto", **options: Any) -> Contestant:
    """This package: correction, masks and update in one pass; ``options`` are those of ``SparseOpt``."""
    optimizer = SparseOpt(
        network.parameters,
        lr=LR,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        masks=network.masks,
        backend=backend,
        **options,
    )
    return Contestant("sparseopt", network, optimizer.step)


def sgd_fused(network: Network, max_grad_norm: float | None = None, nesterov: bool = False) -> Contestant:
    """PyTorch's fused SGD on dense weights: no mask and no correction, less work than asked for."""
    optimizer = _sgd(network, fused=True, nesterov=nesterov)
    if max_grad_norm is None:
        return Contestant("sgd fused, no mask", network, optimizer.step, has_masks=False)
    network.own_gradients()

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(network.parameters, max_grad_norm, foreach=True)
        optimizer.step()

    return Contestant("sgd fused, no mask", network, step, has_masks=False)


def eager_chain(network: Network, fused: bool = False) -> Contestant:
    """What one writes first without this package: scale the gradients, mask them by a boolean mask, step,
    mask the weights."""
    return Contestant("eager chain", network, _chain(network, fused), lambda: _restore_gradients(network))


def tuned_chain(network: Network) -> Contestant:
    """The fastest that is as simple: ``c_i * mask`` as one factor of the dtype of the weights, which PyTorch
    multiplies faster than by a boolean mask, all tensors in one call, and the fused SGD.

    The weights are masked in each step, as one does who changes masks; with masks that stay as they are, that
    pass over memory could be left out.
    """
    network.own_gradients()
    optimizer = _sgd(network, fused=True)
    scales = _factors(network)
    masked: list[Tensor] = list(network.masks)
    gradients: list[Tensor] = [p.grad for p in network.masks]  # type: ignore[misc]
    masks = [mask.to(p.dtype) for p, mask in network.masks.items()]
    factors = [scales[p] * mask for p, mask in zip(network.masks, masks, strict=True)]

    @torch.no_grad()
    def step() -> None:
        torch._foreach_mul_(gradients, factors)
        optimizer.step()
        torch._foreach_mul_(masked, masks)

    return Contestant("eager chain, tuned", network, step, lambda: _restore_gradients(network))


def compiled_chain(network: Network) -> Contestant:
    """The same chain, optimizer included, under ``torch.compile``."""
    step = torch.compile(_chain(network))
    return Contestant("torch.compile of the chain", network, step, lambda: _restore_gradients(network))


def compiled_function(network: Network) -> Contestant:
    """The chain written anew as one function of tensors, for ``torch.compile`` to fuse as best it can:
    no optimizer object, gradients not written, weights and momentum masked where they are computed."""
    factors = _factors(network)
    weights = [p.detach() for p in network.parameters]
    buffers = [torch.zeros_like(p) for p in weights]
    masks = [network.masks.get(p) for p in network.parameters]
    scales = [factors.get(p) for p in network.parameters]
    # All tensors are arguments: other masks of the same shapes need no other code.
    update = torch.compile(_update, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def step() -> None:
        gradients: list[Tensor] = [p.grad for p in network.parameters]  # type: ignore[misc]
        update(weights, gradients, buffers, masks, scales)

    return Contestant("torch.compile of one function", network, step)


def _update(
    weights: list[Tensor],
    gradients: list[Tensor],
    buffers: list[Tensor],
    masks: list[Tensor | None],
    scales: list[Tensor | None],
) -> None:
    for p, g, b, mask, scale in zip(weights, gradients, buffers, masks, scales, strict=True):
        d = (g if scale is None else g * scale) + WEIGHT_DECAY * p
        b_new = MOMENTUM * b + d
        p_new = p - LR * b_new
        b.copy_(b_new if mask is None else torch.where(mask, b_new, 0.0))
        p.copy_(p_new if mask is None else torch.where(mask, p_new, 0.0))


def _chain(network: Network, fused: bool = False) -> Callable[[], None]:
    """The factors c_i are computed once, as one would between two changes of the masks."""
    network.own_gradients()
    optimizer = _sgd(network, fused=fused, foreach=not fused)
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
