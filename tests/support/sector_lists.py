"""What the GPU backends keep of a mask, against a plain computation."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from backends import Backend
from torch import Tensor
from torch.nn.parameter import Parameter

from sparseopt_kernels import SparseOpt
from sparseopt_kernels.kernels.gpu import plan as gpu_plan
from sparseopt_kernels.kernels.gpu.lists import LISTED, Sectors, weights_per_sector
from sparseopt_kernels.kernels.gpu.plan import GpuPlan


def plan_of(backend: Backend, mask: Tensor, dtype: torch.dtype) -> GpuPlan:
    """The backend's plan for a mask, with which a step was made."""
    found: list[GpuPlan] = []
    plan_class = gpu_plan.GpuPlan

    class Noting(plan_class):  # type: ignore[misc, valid-type]
        def step(self, inputs: Any) -> None:
            super().step(inputs)
            found.append(self)

    p = Parameter(torch.zeros(mask.shape, dtype=dtype))
    p.grad = torch.zeros_like(p)
    with mock.patch.object(gpu_plan, "GpuPlan", Noting):
        SparseOpt([p], lr=0.1, momentum=0.9, masks={p: mask}, backend=backend.name).step()
    return found[0]


def check_lists(backend: Backend, mask: Tensor, dtype: torch.dtype) -> None:
    """What the backend keeps of a mask, once a step is made with it."""
    sectors = plan_of(backend, mask, dtype)._listed[0].sectors
    assert sectors is not None
    assert_lists(sectors, mask, dtype)


def assert_lists(sectors: Sectors, mask: Tensor, dtype: torch.dtype) -> None:
    """Mask bits of all sectors, the live ones in order as far as there is room, the fan-in of each row."""
    lanes = weights_per_sector(dtype)
    active = mask.view(torch.uint8) != 0
    flat = torch.nn.functional.pad(active.flatten().long(), (0, -mask.numel() % lanes)).view(-1, lanes)
    bits = (flat << torch.arange(lanes)).sum(dim=1)
    live = bits.nonzero()[:, 0]
    room = int(LISTED * len(bits))
    assert sectors.mask_bits.long().tolist() == bits.tolist()
    assert int(sectors.live) == len(live)
    assert len(sectors.listed) == len(sectors.listed_bits) == room
    listed = min(room, len(live))
    assert sectors.listed[:listed].tolist() == live[:listed].tolist()
    assert sectors.listed_bits[:listed].long().tolist() == bits[live[:listed]].tolist()
    assert torch.equal(sectors.fan_in, active.sum(dim=1, dtype=torch.int32))
