"""The backends, and which of them runs a step.

Here may be whatever counts, updates and measures by the contract. A backend knows its parameters and numbers,
and never the optimizer or a topology.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch

from ..user_warning import warn
from . import cpu
from .contract import Backend
from .cpu import CPU
from .gpu import cuda
from .gpu.cuda import CUDA
from .gpu.triton import TRITON
from .reference import REFERENCE

BACKENDS: dict[str, Backend] = {"reference": REFERENCE, "cpu": CPU, "triton": TRITON, "cuda": CUDA}
"""By the name that ``SparseOpt(backend=)`` takes. Put yours in here, to be asked for by that name:
``"auto"`` chooses among those of ``_AUTO`` only."""
# What "auto" tries first, by device.
_AUTO = {"cpu": ("cpu",), "cuda": ("cuda", "triton"), "xpu": ("triton",)}


def build_info() -> dict[str, Any]:
    """Return what was built when the package was installed, as a dict.

    - ``native``: True if there is a CPU library. Then ``compiler`` is what built it, ``openmp`` is True if it
      has threads, and ``isas`` lists the instruction sets of its kernels that this processor can run. If
      there is none, ``reason`` says why.
    - ``cuda``: the version of CUDA that the CUDA kernels were built with, or False. Then
      ``cuda_architectures`` lists the GPUs that there is machine code for (90 is sm_90), and ``cuda_ptx``
      those whose PTX drivers translate for later GPUs.
    """
    return {**cpu.build_info(), **cuda.build_info()}


def chosen_name(backend: str) -> str:
    """Return ``backend``; for ``"auto"``, the environment variable SPARSEOPT_BACKEND if it is set."""
    name, source = backend, "backend"
    if backend == "auto" and os.environ.get("SPARSEOPT_BACKEND"):
        name, source = os.environ["SPARSEOPT_BACKEND"], "SPARSEOPT_BACKEND"
    if name not in ("auto", *BACKENDS):
        known = ", ".join(repr(known) for known in ("auto", *BACKENDS))
        raise ValueError(f"{source} is {name!r}, it must be one of {known}")
    return name


def backend_for(name: str, device: torch.device) -> Backend:
    """Return the backend that updates tensors on ``device``.

    Raises:
        RuntimeError: ``name`` is not ``"auto"`` and that backend cannot run there; it says why.
    """
    if name != "auto":
        reason = BACKENDS[name].unavailable(device)
        if reason is not None:
            asked = " (SPARSEOPT_BACKEND asks for it)" if os.environ.get("SPARSEOPT_BACKEND") == name else ""
            raise RuntimeError(f"backend {name!r} cannot run: {reason}{asked}")
        return BACKENDS[name]
    reasons = []
    for candidate in _AUTO.get(device.type, ()):
        reason = BACKENDS[candidate].unavailable(device)
        if reason is None:
            return BACKENDS[candidate]
        reasons.append(f"backend {candidate!r}: {reason}")
    if reasons:
        _say_once("SparseOpt uses its slow reference backend, because " + "; ".join(reasons))
    return REFERENCE


def name_of(backend: Backend) -> str:
    """Return the name of a backend that is in ``BACKENDS``."""
    return next(name for name, each in BACKENDS.items() if each is backend)


@cache
def _say_once(message: str) -> None:
    warn(message, RuntimeWarning)
