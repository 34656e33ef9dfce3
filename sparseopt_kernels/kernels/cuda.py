"""The CUDA backend: C++ kernels (``csrc/cuda``), one launch for up to ``_cuda.LAUNCH_CAPACITY`` parameters.

The table of tensors is an argument of the kernel: nothing is copied to the device, and a step can be
captured in a CUDA graph. Nothing waits for the device.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..neurons import arithmetic_dtype
from . import reference
from .contract import Batch, Rule
from .device import keep_for_graph, made_current
from .memory import DTYPE_NAMES, Walk, walk_rows

_MISSING: str | None = None
try:
    import sparseopt_kernels._cuda as _cuda
except ModuleNotFoundError:
    _MISSING = "the CUDA kernels were not built (SPARSEOPT_CUDA=1 pip install . builds them, or says why not)"
except ImportError as error:
    _MISSING = f"the CUDA kernels cannot be loaded ({error})"


def build_info() -> dict[str, Any]:
    """What the CUDA kernels were built with: see ``kernels.build_info``."""
    if _MISSING:
        return {"cuda": False}
    info = _cuda.build_info()
    return {
        "cuda": info["cuda"],
        "cuda_architectures": info["architectures"],
        "cuda_ptx": info["ptx"],
    }


def unavailable(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.cuda is None:
        where = device.type if device.type != "cuda" else "those of ROCm"
        return f"it updates tensors on NVIDIA devices, not on {where}"
    return _MISSING or _no_code_for(device)


@cache
def _no_code_for(device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    built = build_info()
    codes, ptx = built["cuda_architectures"], built["cuda_ptx"]
    # Machine code runs on later minor versions of its generation, PTX on everything later.
    if any(code // 10 == major and code % 10 <= minor for code in codes) or any(
        code <= 10 * major + minor for code in ptx
    ):
        return None
    known = ", ".join(f"sm_{code}" for code in sorted({*codes, *ptx}))
    return (
        f"{device} is an sm_{major}{minor}, and this build has code for {known}: install sparseopt_kernels "
        f"again with CUDAARCHS={major}{minor}"
    )


def host_scalars(device: torch.device) -> bool:
    return False


def step(batch: Batch) -> None:
    plan = _current_plan(batch)
    assert batch.flags is not None
    grads = plan.walk.grads(batch)
    with made_current(batch.device):
        _cuda.step(
            plan.table,
            list(map(Tensor.data_ptr, grads)),
            list(map(_native_rule, batch.rules)),
            batch.flags.data_ptr(),
            _address(batch.grad_scale),
            _address(batch.found_inf),
            _stream(batch.device),
        )
    for i in plan.walk.elsewhere:
        reference.update(batch, i)


def squared_norm(batch: Batch) -> Tensor:
    plan = _current_plan(batch)
    sums = torch.empty(
        _cuda.partial_sum_count(plan.table),
        dtype=arithmetic_dtype(batch.dtype),
        device=batch.device,
    )
    grads = plan.walk.grads(batch)
    with made_current(batch.device):
        _cuda.squared_norm(
            plan.table,
            list(map(Tensor.data_ptr, grads)),
            list(map(_native_rule, batch.rules)),
            sums.data_ptr(),
            _stream(batch.device),
        )
    total = sums.sum(dtype=torch.float64)
    for i in plan.walk.elsewhere:
        total += reference.squared_norm_of(batch, i)
    return total


class _BatchPlan(NamedTuple):
    """The native form of a batch."""

    walk: Walk
    table: Any  # _cuda.Table


def _current_plan(batch: Batch) -> _BatchPlan:
    plan: _BatchPlan = batch.plan
    if plan is None or not plan.walk.fits(batch):
        plan = batch.plan = _plan_batch(batch)
    keep_for_graph((batch.flags, [entry.plan for entry in plan.walk.entries]))
    return plan


def _plan_batch(batch: Batch) -> _BatchPlan:
    walk = walk_rows(batch, DTYPE_NAMES, _pack)
    tensors = [
        _cuda.Tensor(
            DTYPE_NAMES[batch.dtype],
            entry.parameter.data_ptr(),
            _address(entry.momentum_buffer),
            entry.plan.rows,
            entry.plan.columns,
            _address(entry.plan.bits),
            _address(entry.plan.mean_fan_in),
            entry.ham,
            position,
        )
        for entry, position in zip(walk.entries, walk.positions, strict=True)
    ]
    return _BatchPlan(walk, _cuda.Table(tensors, [entry.group for entry in walk.entries]))


def _pack(mask: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = mask.shape
    bits = torch.empty(rows, -(-columns // 8), dtype=torch.uint8, device=mask.device)
    nnz = torch.empty((), dtype=torch.int64, device=mask.device)
    with made_current(mask.device):
        _cuda.pack(mask.data_ptr(), rows, columns, bits.data_ptr(), nnz.data_ptr(), _stream(mask.device))
    return bits, nnz


def _native_rule(rule: Rule) -> Any:
    lr, gamma = rule.lr, rule.gamma
    return _cuda.Rule(
        0.0 if isinstance(lr, Tensor) else lr,
        _address(lr if isinstance(lr, Tensor) else None),
        rule.momentum,
        rule.dampening,
        rule.weight_decay,
        rule.nesterov,
        rule.maximize,
        rule.correction,
        rule.ham_alpha,
        rule.ham_beta,
        0.0 if isinstance(gamma, Tensor) else gamma,
        _address(gamma if isinstance(gamma, Tensor) else None),
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _stream(device: torch.device) -> int:
    """The stream that PyTorch queues this thread's work on."""
    return int(torch.cuda.current_stream(device).cuda_stream)
