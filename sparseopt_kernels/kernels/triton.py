"""The Triton backend, for CUDA, ROCm and XPU devices: launches the kernels of ``triton_step``.

A step is one launch per class of rows (short or long, aligned to 16 bytes or not) and one for dense
tensors, over all parameters of a dtype. The kernels find their tensors in a table in device memory (see
``triton_plan``). Nothing waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .contract import Batch, Rule
from .device import capturing, keep_for_graph, made_current
from .triton_plan import BatchPlan

_OLDEST = (3, 5)  # with which all tests of compiled kernels pass
_MISSING: str | None = None
_INTERPRETED = False
try:
    import triton
    import triton.language as tl

    _VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if _VERSION < _OLDEST:
        raise ImportError(f"Triton {triton.__version__} is installed, it needs 3.5 or newer")
    from . import triton_step

    _INTERPRETED = not isinstance(triton_step.masked_step, triton.JITFunction)
    _TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
except ImportError as error:
    _MISSING = str(error)
    if isinstance(error, ModuleNotFoundError) and error.name == "triton":
        _MISSING = "Triton is not installed (pip install triton)"

_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}  # rounding is decided where a kernel says fma
_CORRECTIONS = {"none": 0.0, "layer": 1.0, "unnormalized": 2.0}


def unavailable(device: torch.device) -> str | None:
    if _INTERPRETED:
        if device.type == "cpu":
            return None
        return f"TRITON_INTERPRET is set: it updates tensors on the cpu, not on {device.type}"
    if device.type in ("cuda", "xpu"):
        return _MISSING
    reason = f"it updates tensors on cuda and xpu devices, not on {device.type}"
    return reason if _MISSING is None else f"{reason}; {_MISSING}"


def host_scalars(device: torch.device) -> bool:
    return False


def step(batch: Batch) -> None:
    plan, grads, addresses = _prepare(batch)
    with made_current(batch.device):
        for launch in plan.launches:
            rules = batch.rules[launch.groups]
            kernel = triton_step.masked_step if launch.masked else triton_step.dense_step
            kernel[(len(launch.owner),)](
                plan.table, addresses, launch.owner, batch.flags, batch.found_inf, batch.grad_scale,
                tuple(map(_rule, rules)),
                TYPE=_TYPES[batch.dtype], ALIGNED=launch.aligned, MOMENTUM=launch.momentum,
                HAM=any(rule.ham_alpha != 0 or rule.ham_beta != 0 for rule in rules),
                **launch.tile, **_OPTIONS,
            )  # fmt: skip
    del grads  # copies of them must live until here
    for i in plan.walk.elsewhere:
        reference.update(batch, i)


def squared_norm(batch: Batch) -> Tensor:
    plan, grads, addresses = _prepare(batch)
    total = torch.zeros((), dtype=torch.float64, device=batch.device)
    with made_current(batch.device):
        for launch in plan.launches:
            sums = torch.empty(len(launch.owner), 2, device=batch.device)
            arguments: list[Any] = [plan.table, addresses, launch.owner]
            kernel = triton_step.dense_squares
            if launch.masked:
                kernel = triton_step.masked_squares
                arguments.append(tuple(map(_rule, batch.rules[launch.groups])))
            kernel[(len(launch.owner),)](
                *arguments, sums, TYPE=_TYPES[batch.dtype], ALIGNED=launch.aligned, **launch.tile, **_OPTIONS
            )
            total += sums.sum(dtype=torch.float64)
    del grads  # as above
    for i in plan.walk.elsewhere:
        total += reference.squared_norm_of(batch, i)
    return total


def _rule(rule: Rule) -> tuple[float | Tensor, ...]:
    """A rule as the kernels take it. Numbers are floats: Triton would compile anew for another integer."""
    return (
        rule.lr if isinstance(rule.lr, Tensor) else float(rule.lr),
        float(rule.momentum),
        1.0 - float(rule.dampening),  # not on the device: the float32 nearest to it would lose digits
        float(rule.weight_decay),
        float(rule.nesterov),
        float(rule.ham_alpha),
        float(rule.ham_beta),
        _CORRECTIONS[rule.correction],
        -1.0 if rule.maximize else 1.0,
        rule.gamma,
    )


def _prepare(batch: Batch) -> tuple[BatchPlan, list[Tensor], Tensor]:
    """The plan of a batch, its gradients as the kernels read them, and their addresses on the device."""
    plan: BatchPlan | None = batch.plan
    if plan is None or not plan.walk.fits(batch):
        plan = BatchPlan(batch)
    grads = plan.walk.grads(batch)
    addresses = list(map(Tensor.data_ptr, grads))
    if not plan.takes(addresses):
        plan = BatchPlan(batch)
    if not capturing():  # else its table is written when the graph runs: it is good for that graph alone
        batch.plan = plan
    on_device = plan.on_device(addresses, batch.device)
    masks = [entry.plan for entry in plan.walk.entries]
    keep_for_graph((plan.table, plan.launches, on_device, batch.flags, masks))
    return plan, grads, on_device
