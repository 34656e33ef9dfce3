"""A small network with masks, and whether two of them, or their optimizers, are the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from side_by_side import pattern_mask, same_bits
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from sparseopt_kernels.masks.mapping import Masks

HYPERS: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.1},
    "momentum": {"lr": 0.1, "momentum": 0.9},
    "dampening": {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
    "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "maximize": {"lr": 0.01, "momentum": 0.5, "maximize": True},
}
each_hyper = pytest.mark.parametrize("hyper", HYPERS.values(), ids=HYPERS)


class Network(nn.Sequential):
    """Two linear layers of which both weights are masked, in float64 unless asked otherwise."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        super().__init__(nn.Linear(13, 9), nn.Tanh(), nn.Linear(9, 4))
        generator = torch.Generator().manual_seed(seed)
        for layer in (self[0], self[2]):
            layer.register_buffer("weight_mask", pattern_mask("half", layer.weight.shape, generator))
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
        for weight, mask in self.masks_dict().items():  # as sparsify leaves it
            weight.data.masked_fill_(~mask, 0.0)
        self.to(dtype)

    if TYPE_CHECKING:  # what layers have, nn.Module does not know

        def __getitem__(self, index: Any) -> Any: ...

    def masks_dict(self) -> dict[Parameter, Tensor]:
        return {layer.weight: layer.weight_mask for layer in (self[0], self[2])}

    def masks(self, kind: str) -> Any:
        return {"Masks": Masks(self), "dict": self.masks_dict(), "no-mask": {}}[kind] if kind else None

    def set_grads(self, step: int, scale: float = 1.0) -> Tensor:
        """Backward of a loss on data that depends on the step alone; returns the loss."""
        generator = torch.Generator().manual_seed(1000 + step)
        dtype = self[0].weight.dtype
        x, y = (torch.randn(8, n, generator=generator).to(dtype) for n in (13, 4))
        for parameter in self.parameters():
            parameter.grad = None
        loss = (self(x) - y).square().mean()
        (loss * scale).backward()
        return loss


each_mapping = pytest.mark.parametrize("mapping", ["Masks", "dict", "no-mask"])


def run(model: Network, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        model.set_grads(step)
        optimizer.step()


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert same_bits(p, q), name


def assert_same_state(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    first, second = a.state_dict()["state"], b.state_dict()["state"]
    assert first.keys() == second.keys()
    for key, entry in first.items():
        assert entry.keys() == second[key].keys()
        for name, value in entry.items():
            assert same_bits(value, second[key][name]), f"{name} of parameter {key}"
