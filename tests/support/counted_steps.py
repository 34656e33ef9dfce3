"""Steps of four parameters, of which it is counted how often everything is observed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from sparseopt_kernels import optimizer as optimizer_module
from sparseopt_kernels.optimizer import SparseOpt
from sparseopt_kernels.step import change_detection


class Run:
    """Four parameters in two groups, one without a gradient."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float32, **options: Any):
        self.long = 0
        observe = change_detection.observe

        def counted(*arguments: Any) -> Any:
            self.long += 1
            return observe(*arguments)

        monkeypatch.setattr(optimizer_module, "observe", counted)
        generator = torch.Generator().manual_seed(0)
        self.generator = generator
        shapes = [(8, 5), (7,), (3, 2, 3, 3), (4,)]
        self.params = [Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]
        self.masks = {p: torch.rand(p.shape, generator=generator) > 0.5 for p in self.params if p.ndim > 1}
        groups: list[dict[str, Any]] = [
            {"params": self.params[:2]},
            {"params": self.params[2:], "lr": 0.3, "correction": "none"},
        ]
        self.optimizer = SparseOpt(
            groups, **{"lr": 0.1, "momentum": 0.9, **options}, masks=self.masks, backend="cpu"
        )

    def step(self) -> int:
        """Make one, and return how often the optimizer observed everything."""
        for p in self.params[:3]:
            p.grad = torch.randn(p.shape, generator=self.generator).to(p.dtype)
        before = self.long
        self.optimizer.step()
        return self.long - before

    def settle(self) -> Run:
        for _ in range(3):
            self.step()
        return self

    def tensors(self) -> list[Tensor]:
        states = self.optimizer.state
        buffers = [states[p].get("momentum_buffer") for p in self.params if p in states]
        return [p.detach().clone() for p in self.params] + [b.clone() for b in buffers if b is not None]
