"""The CUDA backend: launches the kernels of csrc/cuda, C++ that is compiled when the package is installed.

``plan`` says when. The addresses of gradients are arguments of the kernels: when gradients move, nothing is
copied to the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...neurons import arithmetic_dtype
from ..contract import Inputs, Rule
from ..memory import DTYPE_NAMES, address_of
from .device import current_stream, multiprocessors
from .lists import Listing
from .plan import GpuBackend
from .tables import SectorLaunch, StepLaunch

_MISSING: str | None = None
try:
    import sparseopt_kernels._cuda as _cuda
except ModuleNotFoundError:
    _MISSING = "the CUDA kernels were not built (SPARSEOPT_CUDA=1 pip install . builds them, or says why not)"
except ImportError as error:
    _MISSING = f"the CUDA kernels cannot be loaded ({error})"


def build_info() -> dict[str, Any]:
    """Return what the CUDA kernels were built with: see ``kernels.build_info``."""
    if _MISSING:
        return {"cuda": False}
    info = _cuda.build_info()
    return {"cuda": info["cuda"], "cuda_architectures": info["architectures"], "cuda_ptx": info["ptx"]}


@cache
def _no_code_for(device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    built = build_info()
    driver = _cuda.driver_version()
    built_major, built_minor = (int(part) for part in built["cuda"].split(".")[:2])
    if driver // 1000 < built_major:
        return (
            f"they were built with CUDA {built['cuda']}, and the driver knows CUDA "
            f"{driver // 1000}.{driver % 1000 // 10} at most: install a newer driver, or sparseopt_kernels "
            "again with an older nvcc"
        )
    codes, ptx = built["cuda_architectures"], built["cuda_ptx"]
    if driver < 1000 * built_major + 10 * built_minor:
        ptx = []  # drivers translate what compilers of their time wrote, and older ones
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


class Cuda(GpuBackend):
    def __init__(self) -> None:
        super().__init__(CudaKernels(), DTYPE_NAMES)

    def unavailable(self, device: torch.device) -> str | None:
        if device.type != "cuda" or torch.version.cuda is None:
            where = device.type if device.type != "cuda" else "those of ROCm"
            return f"it updates tensors on NVIDIA devices, not on {where}"
        return _MISSING or _no_code_for(device)


class CudaKernels:
    """``plan.GpuKernels``. Sizes are those of threads.h and argument.h; a test compares them."""

    most_tensors = 400  # whose gradients' addresses fit into the arguments of a kernel
    chunk = 32  # sectors: a warp's
    by_alignment = False  # each thread checks addresses itself
    list_rows = 8  # a warp each

    def step_rows(self, columns: int) -> int:
        return _cuda.step_rows(columns)

    def place(self, addresses: bytes, device: torch.device) -> bytes:
        return addresses

    def count_rows(self, listing: Listing) -> None:
        stream = current_stream(listing.table.device)
        _cuda.count_rows(*_of(listing), listing.programs, stream)

    def list_sectors(self, listing: Listing, ends: Tensor) -> None:
        stream = current_stream(listing.table.device)
        _cuda.list_sectors(*_of(listing), ends.data_ptr(), listing.programs, stream)

    def masked_step(self, launch: StepLaunch, gradients: bytes, inputs: Inputs) -> None:
        _cuda.masked_step(
            DTYPE_NAMES[launch.dtype],
            launch.table.data_ptr(),
            launch.program_to_tensor.data_ptr(),
            launch.programs,
            *_inputs(launch, gradients, inputs),
        )

    def sector_step(self, launch: SectorLaunch, gradients: bytes, inputs: Inputs) -> None:
        _cuda.sector_step(_native(launch), *_inputs(launch, gradients, inputs))

    def sector_squares(self, launch: SectorLaunch, gradients: bytes) -> Tensor:
        native, device = _native(launch), launch.table.device
        sums = torch.empty(native.blocks, 2, dtype=arithmetic_dtype(launch.dtype), device=device)
        _cuda.sector_squares(native, gradients, sums.data_ptr(), current_stream(device))
        return sums


def _of(listing: Listing) -> tuple[str, int, int, int, int]:
    """Return the arguments that both list kernels take."""
    return (
        DTYPE_NAMES[listing.dtype],
        listing.table.data_ptr(),
        listing.program_to_tensor.data_ptr(),
        listing.fan_in.data_ptr(),
        listing.live.data_ptr(),
    )


def _inputs(
    launch: StepLaunch | SectorLaunch, gradients: bytes, inputs: Inputs
) -> tuple[bytes, Sequence[Rule], int, int, int]:
    """Return the arguments that both steps take, besides memory that stays."""
    return (
        gradients,
        inputs.rules[launch.rules],
        address_of(inputs.grad_scale),
        address_of(inputs.found_inf),
        current_stream(launch.table.device),
    )


def _native(launch: SectorLaunch) -> _cuda.SectorLaunch:
    return _cuda.SectorLaunch(
        dtype=DTYPE_NAMES[launch.dtype],
        table=launch.table.data_ptr(),
        chunk_to_tensor=launch.chunk_to_tensor.data_ptr(),
        chunks=launch.chunks.data_ptr(),
        wide=launch.wide,
        most_chunks=launch.most_chunks,
        multiprocessors=multiprocessors(launch.table.device),
    )


CUDA = Cuda()
