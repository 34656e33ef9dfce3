"""What the GPU backends keep of a mask, against a plain computation."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
from backends import Backend
from torch import Tensor
from torch.nn.parameter import Parameter

from sparseopt_kernels import SparseOpt
from sparseopt_kernels.kernels import gpu_plan
from sparseopt_kernels.kernels.gpu_plan import Kept
from sparseopt_kernels.kernels.sectors import LISTED, weights_per_sector


def kept_of(backend: Backend, mask: Tensor, dtype: torch.dtype) -> Kept:
    """What the backend keeps of a mask."""
    found: list[Kept] = []
    plan_class = gpu_plan.GpuPlan

    class Noting(plan_class):  # type: ignore[misc, valid-type]
        def step(self, inputs: Any) -> None:
            super().step(inputs)
            found.extend(self._kept)

    p = Parameter(torch.zeros(mask.shape, dtype=dtype))
    p.grad = torch.zeros_like(p)
    with mock.patch.object(gpu_plan, "GpuPlan", Noting):
        SparseOpt([p], lr=0.1, momentum=0.9, masks={p: mask}, backend=backend.name).step()
    return found[0]


def check_lists(backend: Backend, mask: Tensor, dtype: torch.dtype) -> None:
    """Mask bits of all sectors, the live ones in order as far as there is room, c_i of each row."""
    kept = kept_of(backend, mask, dtype).sectors
    assert kept is not None
    rows, columns = mask.shape
    lanes = weights_per_sector(dtype)
    active = mask.view(torch.uint8) != 0
    flat = torch.nn.functional.pad(active.flatten().long(), (0, -mask.numel() % lanes)).view(-1, lanes)
    bits = (flat << torch.arange(lanes)).sum(dim=1)
    live = bits.nonzero()[:, 0]
    room = int(LISTED * len(bits))
    assert kept.masks.long().tolist() == bits.tolist()
    assert int(kept.live) == len(live)
    assert len(kept.listed) == len(kept.bits) == room
    listed = min(room, len(live))
    assert kept.listed[:listed].tolist() == live[:listed].tolist()
    assert kept.bits[:listed].long().tolist() == bits[live[:listed]].tolist()
    fan_in, nnz = active.sum(dim=1), int(active.sum())
    for row in range(rows):
        expected = math.sqrt(int(fan_in[row]) * rows / nnz) if nnz else 0.0
        assert float(kept.factors[0, row]) == pytest.approx(expected, rel=1e-6)
        assert float(kept.factors[1, row]) == pytest.approx(math.sqrt(int(fan_in[row]) / columns), rel=1e-6)
