"""The optimizer as PyTorch's suite constructs it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends import Backend
from side_by_side import pattern_mask
from torch import Tensor

from sparseopt_kernels.optimizer import SparseOpt


def mask_of(shape: torch.Size) -> Tensor:
    return pattern_mask("half", shape, torch.Generator().manual_seed(0))


@pytest.fixture
def make(backend: Backend, masked: bool) -> Any:
    """Construct the optimizer as the suite does, with a mask for each matrix where asked for."""

    def construct(params: Any, **kwargs: Any) -> SparseOpt:
        params = list(params)
        masks = {}
        if masked:
            members = [p for g in params for p in (g["params"] if isinstance(g, dict) else [g])]
            tensors = [p[1] if isinstance(p, tuple) else p for p in members]
            masks = {p: mask_of(p.shape) for p in tensors if p.ndim == 2}
            for p, mask in masks.items():  # as sparsify leaves them
                p.data *= mask
        return SparseOpt(params, masks=masks, backend=backend.name, **kwargs)

    return construct


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
