"""The Triton backend without a GPU: its kernels only note that they were launched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparseopt_kernels.kernels.gpu import triton
from sparseopt_kernels.optimizer import SparseOpt

Launches = list[dict[str, Any]]
"""For each launch, its kernel, its grid and its compile-time constants."""


def note_launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Let the Triton backend take CPU tensors, and return the list of launches, which grows."""
    pytest.importorskip("triton")
    noted: Launches = []

    class Loaded:
        def __init__(self, name: str, constants: dict[str, Any]) -> None:
            self.name, self.constants = name, constants

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            assert grid[0] > 0
            return lambda *_: noted.append({"kernel": self.name, "grid": grid, **self.constants})

    def load(kernel: Any, device: torch.device, arguments: list[Any], constants: dict[str, Any]) -> Any:
        return triton.Loaded(Loaded(kernel.__name__, constants), 1 << 30)

    monkeypatch.setattr(triton, "_load", load)
    monkeypatch.setattr(triton, "LOADED", {})
    monkeypatch.setattr(triton.TRITON, "unavailable", lambda device: None)
    return noted


def new_mask(optimizer: SparseOpt) -> None:
    """Invert the masks of an optimizer, in place."""
    for mask in optimizer._masks.values():
        mask.logical_not_()
