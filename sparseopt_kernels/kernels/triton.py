"""The Triton backend, for CUDA, ROCm and XPU devices: launches the kernels of ``triton_step``.

A step is one launch per class of rows (short or long, aligned to 16 bytes or not) and one for dense
tensors, over all parameters of a dtype. The kernels find their tensors in a table in device memory (see
``triton_plan``). Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .contract import Inputs, Rule, Tensors
from .derived import Derived
from .device import capturing, keep_for_graph, made_current, reserve_staging, upload
from .memory import Rows, has_rows, is_walkable, rows_of
from .triton_plan import DTYPES, Layout, alignments, pack

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
_GRAPHS = 4  # that can be captured after each other, without a step outside of them
_ROUNDING = 256  # bytes: of the uploads of a step, each to a multiple of 16
_CORRECTIONS = {"none": 0.0, "layer": 1.0, "unnormalized": 2.0}


class Triton:
    def __init__(self) -> None:
        self._rows = Derived(partial(rows_of, pack=pack))

    def unavailable(self, device: torch.device) -> str | None:
        if _INTERPRETED:
            if device.type == "cpu":
                return None
            return f"TRITON_INTERPRET is set: it updates tensors on the cpu, not on {device.type}"
        if device.type in ("cuda", "xpu"):
            return _MISSING
        reason = f"it updates tensors on cuda and xpu devices, not on {device.type}"
        return reason if _MISSING is None else f"{reason}; {_MISSING}"

    def host_scalars(self, device: torch.device) -> bool:
        return False

    def supports(self, tensors: Tensors) -> bool:
        return tensors.parameter.dtype in DTYPES and is_walkable(tensors) and has_rows(tensors)

    def plan(self, tensors: Sequence[Tensors]) -> TritonPlan:
        return TritonPlan(tensors, self._rows(tensors))


class TritonPlan:
    """The launches for certain tensors, and the addresses of their gradients in the last step."""

    def __init__(self, tensors: Sequence[Tensors], rows: Sequence[Rows]) -> None:
        self._tensors, self._rows = tensors, rows
        self._device, self._dtype = tensors[0].parameter.device, tensors[0].parameter.dtype
        self._addresses = b""
        self._addresses_on_device: Tensor | None = None
        self._layout: Layout | None = None

    def step(self, inputs: Inputs) -> None:
        layout, gradients = self._lay_out(inputs.addresses)
        rules = [*map(_argument, inputs.rules)]
        with made_current(self._device):
            for launch in layout.launches:
                kernel = triton_step.masked_step if launch.masked else triton_step.dense_step
                own = rules[launch.groups]
                kernel[(launch.programs,)](
                    layout.table, gradients, launch.owner, inputs.found_inf, inputs.grad_scale, tuple(own),
                    TYPE=_TYPES[self._dtype], ALIGNED=launch.aligned, MOMENTUM=launch.momentum,
                    HAM=any(rule.ham_alpha != 0 or rule.ham_beta != 0 for rule in own),
                    **launch.tile, **_OPTIONS,
                )  # fmt: skip

    def squared_norm(self, inputs: Inputs) -> Tensor:
        layout, gradients = self._lay_out(inputs.addresses)
        rules = [*map(_argument, inputs.rules)]
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        with made_current(self._device):
            for launch in layout.launches:
                sums = torch.empty(launch.programs, 2, device=self._device)
                arguments: list[Any] = [layout.table, gradients, launch.owner]
                kernel = triton_step.dense_squares
                if launch.masked:
                    kernel = triton_step.masked_squares
                    arguments.append(tuple(rules[launch.groups]))
                kernel[(launch.programs,)](
                    *arguments,
                    sums,
                    TYPE=_TYPES[self._dtype],
                    ALIGNED=launch.aligned,
                    **launch.tile,
                    **_OPTIONS,
                )
                total += sums.sum(dtype=torch.float64)
        return total

    def _lay_out(self, addresses: bytes) -> tuple[Layout, Tensor]:
        """The launches that suit gradients at these addresses, and the addresses on the device.

        What is copied while a graph is captured is there when that graph runs: it is good for it alone.
        """
        layout, on_device = self._layout, self._addresses_on_device
        if layout is None or on_device is None or addresses != self._addresses:
            if layout is None or layout.gradients_aligned != alignments(addresses):
                layout = Layout(self._tensors, self._rows, alignments(addresses))
            on_device = upload(torch.frombuffer(bytearray(addresses), dtype=torch.int64), self._device)
            if not capturing():
                self._layout, self._addresses, self._addresses_on_device = layout, addresses, on_device
        if not capturing():
            reserve_staging(_GRAPHS * (layout.nbytes + on_device.nbytes + _ROUNDING), self._device)
        keep_for_graph((layout, self._rows, on_device))
        return layout, on_device


class RuleArgument(NamedTuple):
    """A rule as the kernels take it. Numbers are floats: Triton would compile anew for another integer."""

    lr: float | Tensor
    momentum: float
    fresh: float
    weight_decay: float
    nesterov: float
    ham_alpha: float
    ham_beta: float
    correction: float
    sign: float
    gamma: float | Tensor


def _argument(rule: Rule) -> RuleArgument:
    return RuleArgument(
        lr=rule.lr,
        momentum=rule.momentum,
        fresh=1.0 - rule.dampening,  # not on the device: the float32 nearest to it would lose digits
        weight_decay=rule.weight_decay,
        nesterov=float(rule.nesterov),
        ham_alpha=rule.ham_alpha,
        ham_beta=rule.ham_beta,
        correction=_CORRECTIONS[rule.correction],
        sign=-1.0 if rule.maximize else 1.0,
        gamma=rule.gamma,
    )


TRITON = Triton()
