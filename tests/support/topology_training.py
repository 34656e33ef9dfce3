"""The training of a small network with a sparse training method, step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from side_by_side import same_bits
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from sparseopt_kernels.optimizer import SparseOpt
from sparseopt_kernels.topology.rigl import RigL
from sparseopt_kernels.topology.set import SET
from sparseopt_kernels.topology.sparsify import sparsify

EVERY = 3
BOTH = pytest.mark.parametrize("cls", [SET, RigL])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5)]
    return nn.Sequential(*layers).double()


class Training:
    """A network, its masks, an optimizer and a topology; batches depend on the step alone."""

    def __init__(self, cls: type = RigL, backend: str = "auto", skip_step: bool = True, **options: Any):
        self.model = network()
        self.masks = sparsify(self.model, 0.7, seed=1)
        self.opt = self.optimizer(backend=backend, **options)
        self.dst = cls(self.masks, 0.3, EVERY, stop_at=100, skip_step=skip_step)
        self.step = 0

    def optimizer(self, masks: Any = None, **options: Any) -> SparseOpt:
        masks = self.masks if masks is None else masks
        parameters = options.pop("parameters", None) or self.model.parameters()
        options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, **options}
        return SparseOpt(parameters, masks=masks, **options)

    def backward(self) -> Tensor:
        self.step += 1
        batch = torch.Generator().manual_seed(self.step)
        inputs = torch.randn(20, 12, generator=batch, dtype=torch.float64)
        labels = torch.randint(5, (20,), generator=batch)
        self.model.zero_grad()
        loss = F.cross_entropy(self.model(inputs), labels)
        loss.backward()
        return loss.detach()

    def to_update(self) -> None:
        """Train to the first update of the masks, and make it; the step of the optimizer is to follow."""
        for _ in range(EVERY - 1):
            self.backward()
            self.dst.step()
            self.opt.step()
        self.backward()
        self.dst.step()

    def state(self) -> list[Tensor]:
        buffers = [state["momentum_buffer"] for state in self.opt.state.values()]
        return [t.detach().clone() for t in (*self.model.parameters(), *buffers)]

    def masked_state(self) -> list[Tensor]:
        """What a step that only applies the masks leaves."""
        masks = [self.masks.get(p, torch.tensor(True)) for p in self.model.parameters()]
        pairs = zip(self.state(), [*masks, *masks], strict=False)  # no buffers, before the first step
        return [torch.where(mask, t, 0.0) for t, mask in pairs]

    def steps(self, step: Callable[[], object]) -> bool:
        """Whether a step of an optimizer moves anything beyond the masks."""
        expected = self.masked_state()
        step()
        return not all(map(same_bits, self.state(), expected))
