"""The parameters, masks and gradients of a contestant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from ...masks.mapping import Masks
from ...topology.densities import Distribution, layer_densities

Shape = tuple[int, ...]


@dataclass
class Network:
    """Parameters with gradients, and masks for some of them.

    ``p.grad`` is the tensor in ``gradients`` until ``own_gradients`` is called. A contestant that writes into
    gradients calls it first.
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
        """Return a network with normally distributed weights and gradients, the same in every call.

        Parameters of two or more dimensions have random masks.
        """
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
        return cls._of(weights, masks, [random(shape) for shape in shapes])

    @classmethod
    def of_model(cls, model: nn.Module, gradients: list[Tensor]) -> Network:
        """Return a network of the model's parameters themselves and its registered masks."""
        parameters = list(model.parameters())
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        return cls(parameters, dict(Masks(model)), gradients)

    @classmethod
    def _of(
        cls, weights: Sequence[Tensor], masks: Sequence[Tensor | None], gradients: list[Tensor]
    ) -> Network:
        parameters = [Parameter(weight) for weight in weights]
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        found = {p: mask for p, mask in zip(parameters, masks, strict=True) if mask is not None}
        return cls(parameters, found, gradients)

    def copy(self, dtype: torch.dtype | None = None) -> Network:
        """Return a network with copies of the weights, in ``dtype`` if given. Masks are shared, and so are
        gradients of the same dtype."""
        weights = [p.detach().clone().to(dtype or p.dtype) for p in self.parameters]
        gradients = self.gradients
        if any(weight.dtype != g.dtype for weight, g in zip(weights, gradients, strict=True)):
            gradients = [g.to(dtype) for g in gradients]
        return self._of(weights, [self.masks.get(p) for p in self.parameters], gradients)

    def own_gradients(self) -> None:
        """Give the parameters copies of the gradients."""
        for p, gradient in zip(self.parameters, self.gradients, strict=True):
            p.grad = gradient.clone()

    def restore_gradients(self) -> None:
        """Copy the gradients into each ``p.grad``; ``own_gradients`` must have been called."""
        for p, gradient in zip(self.parameters, self.gradients, strict=True):
            assert p.grad is not None
            assert p.grad is not gradient
            p.grad.copy_(gradient)

    def numel(self) -> int:
        return sum(p.numel() for p in self.parameters)
