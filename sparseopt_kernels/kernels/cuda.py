"""The CUDA backend: C++ kernels (``csrc/cuda``), one launch for up to ``_cuda.LAUNCH_CAPACITY`` parameters.

The table of tensors is an argument of the kernel: nothing is copied to the device, and a step can be
captured in a CUDA graph. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..neurons import arithmetic_dtype
from .contract import Inputs, Rule, Tensors
from .derived import Derived
from .device import keep_for_graph, made_current
from .memory import DTYPE_NAMES, Rows, has_rows, is_walkable, rows_of

_MISSING: str | None = None
try:
    import sparseopt_kernels._cuda as _cuda
except ModuleNotFoundError:
    _MISSING = "the CUDA kernels were not built (SPARSEOPT_CUDA=1 pip install . builds them, or says why not)"
except ImportError as error:
    _MISSING = f"the CUDA kernels cannot be loaded ({error})"


if TYPE_CHECKING:
    from .._cuda import Rule as NativeRule
    from .._cuda import Tensor as NativeTensor


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


class Cuda:
    def __init__(self) -> None:
        self._rows = Derived(partial(rows_of, pack=_pack))

    def unavailable(self, device: torch.device) -> str | None:
        if device.type != "cuda" or torch.version.cuda is None:
            where = device.type if device.type != "cuda" else "those of ROCm"
            return f"it updates tensors on NVIDIA devices, not on {where}"
        return _MISSING or _no_code_for(device)

    def host_scalars(self, device: torch.device) -> bool:
        return False

    def supports(self, tensors: Tensors) -> bool:
        return tensors.parameter.dtype in DTYPE_NAMES and is_walkable(tensors) and has_rows(tensors)

    def plan(self, tensors: Sequence[Tensors]) -> CudaPlan:
        return CudaPlan(tensors, self._rows(tensors))


class CudaPlan:
    def __init__(self, tensors: Sequence[Tensors], rows: Sequence[Rows]) -> None:
        self._tensors, self._rows = tensors, rows  # whose memory the table refers to
        self._device, self._dtype = tensors[0].parameter.device, tensors[0].parameter.dtype
        native = [_native_tensor(t, r) for t, r in zip(tensors, rows, strict=True)]
        self._table = _cuda.Table(native, [t.group for t in tensors])

    def step(self, inputs: Inputs) -> None:
        keep_for_graph(self._rows)
        with made_current(self._device):
            _cuda.step(
                self._table,
                inputs.addresses,
                _rules(inputs),
                _address(inputs.grad_scale),
                _address(inputs.found_inf),
                _stream(self._device),
            )

    def squared_norm(self, inputs: Inputs) -> Tensor:
        keep_for_graph(self._rows)
        sums = torch.empty(
            _cuda.partial_sum_count(self._table), dtype=arithmetic_dtype(self._dtype), device=self._device
        )
        with made_current(self._device):
            _cuda.squared_norm(
                self._table, inputs.addresses, _rules(inputs), sums.data_ptr(), _stream(self._device)
            )
        return sums.sum(dtype=torch.float64)


def _native_tensor(tensors: Tensors, rows: Rows) -> NativeTensor:
    return _cuda.Tensor(
        dtype=DTYPE_NAMES[tensors.parameter.dtype],
        parameter=tensors.parameter.data_ptr(),
        momentum_buffer=_address(tensors.momentum_buffer),
        rows=rows.rows,
        columns=rows.columns,
        bits=_address(rows.bits),
        mean_fan_in=_address(rows.mean_fan_in),
        ham=tensors.ham,
    )


def _pack(mask: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = mask.shape
    bits = torch.empty(rows, -(-columns // 8), dtype=torch.uint8, device=mask.device)
    nnz = torch.empty((), dtype=torch.int64, device=mask.device)
    with made_current(mask.device):
        _cuda.pack(mask.data_ptr(), rows, columns, bits.data_ptr(), nnz.data_ptr(), _stream(mask.device))
    return bits, nnz


def _rules(inputs: Inputs) -> list[NativeRule]:
    return [_native_rule(rule) for rule in inputs.rules]


def _native_rule(rule: Rule) -> NativeRule:
    numbers = rule._asdict()
    for name in ("lr", "gamma"):
        number = numbers[name]
        is_tensor = isinstance(number, Tensor)
        numbers |= {
            name: 0.0 if is_tensor else number,
            f"{name}_address": _address(number if is_tensor else None),
        }
    return _cuda.Rule(**numbers)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _stream(device: torch.device) -> int:
    """The stream that PyTorch queues this thread's work on."""
    return int(torch.cuda.current_stream(device).cuda_stream)


CUDA = Cuda()
