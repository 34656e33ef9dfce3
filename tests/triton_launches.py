"""Launches of a step that stop after compilation, for GPUs that need not be here.

So these are the very kernels and arguments of a training run.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from sparseopt_kernels import SparseOpt
from sparseopt_kernels.kernels import triton as backend

pytest.importorskip("triton", reason="Triton is not installed")
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

NVIDIA = {f"sm_{n}": GPUTarget("cuda", n, 32) for n in (80, 90, 100)}
AMD = {"gfx942": GPUTarget("hip", "gfx942", 64)}
TARGETS = {**NVIDIA, **AMD}

# A tensor of each kind, and of each alignment to 16 bytes: a launch each.
SHAPES = {
    "short": (8, 64),
    "short, unaligned": (8, 27),
    "long": (8, 1024),
    "long, unaligned": (8, 1001),
    "dense": (64,),
    "dense, unaligned": (65,),
}


@dataclass(frozen=True)
class Setting:
    """What decides which code a kernel contains."""

    momentum: float = 0.0
    everything: bool = False  # HAM, GradScaler, learning rate and limit of the norm in tensors, two groups


SETTINGS = {"sgd": Setting(), "momentum": Setting(0.9), "everything": Setting(0.9, everything=True)}


@dataclass(frozen=True)
class Launch:
    """A kernel that was compiled, and what for."""

    kernel: str
    shape: str  # a key of SHAPES
    compiled: Any
    size: int  # bytes of a weight
    weights: int  # of a thread in one tile
    mask_bytes: int  # likewise
    momentum: bool

    @property
    def name(self) -> str:
        return f"{self.kernel} ({self.shape})"

    @property
    def aligned(self) -> bool:
        return "unaligned" not in self.shape

    @property
    def streams(self) -> tuple[int, int]:
        """How many tensors it reads and writes: p, g and b, p and b. Norms read g."""
        return (2 + self.momentum, 1 + self.momentum) if self.kernel.endswith("step") else (1, 0)

    def assembly(self, target: str) -> str:
        return str(self.compiled.asm["ptx" if target in NVIDIA else "amdgcn"])

    def cubin(self, folder: Path) -> Path:
        path = folder / "kernel.cubin"
        path.write_bytes(self.compiled.asm["cubin"])
        return path


def parameters(dtype: torch.dtype, names: list[str]) -> tuple[list[torch.nn.Parameter], dict[Any, Any]]:
    """A parameter of each kind, and the masks."""
    found, masks = [], {}
    for name in names:
        values = [torch.ones(SHAPES[name], dtype=dtype) for _ in range(2)]
        if name == "dense, unaligned":
            values = [value[1:] for value in values]
        parameter = torch.nn.Parameter(values[0])
        parameter.grad = values[1]
        found.append(parameter)
        if parameter.ndim > 1:
            masks[parameter] = torch.ones_like(parameter, dtype=torch.bool)
    return found, masks


def launches_of_a_step(
    target: GPUTarget, dtype: torch.dtype, names: list[str], setting: Setting, **hyperparameters: Any
) -> list[Launch]:
    """All launches of a step, of which nothing runs."""
    launches: list[Launch] = []
    run = JITFunction.run

    def only_compile(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled = run(self, *arguments, grid=grid, warmup=True, **options)
        threads = options["num_warps"] * target.warp_size
        mask_bytes = options.get("ROWS", 0) * options.get("BYTES", 0)
        launches.append(
            Launch(
                self.__name__,
                _shape_of(options),
                compiled,
                dtype.itemsize,
                options.get("SIZE", 8 * mask_bytes) // threads,
                -(-mask_bytes // threads),
                options.get("MOMENTUM", False),
            )
        )

    gpu = SimpleNamespace(
        get_current_device=lambda: target,  # what compiled kernels are kept by
        get_current_stream=lambda device: 0,
        get_current_target=lambda: target,
    )
    with (
        mock.patch("triton.runtime.jit.driver", SimpleNamespace(active=gpu)),
        mock.patch.object(JITFunction, "run", only_compile),
        mock.patch.object(backend.TRITON, "unavailable", return_value=None),
    ):
        found, masks = parameters(dtype, names)
        hyperparameters = {"lr": 0.1, "momentum": setting.momentum, **hyperparameters}
        groups: list[Any] = [{"params": found}]
        if setting.everything:
            groups = [{"params": found[:3]}, {"params": found[3:]}]
            hyperparameters = {"ham_alpha": 1.0, "max_grad_norm": 1.0, **hyperparameters}
            hyperparameters["lr"] = torch.tensor(hyperparameters["lr"])
        optimizer = SparseOpt(groups, masks=masks, backend="triton", **hyperparameters)
        if setting.everything:
            optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.zeros(())  # type: ignore
        optimizer.step()
    return launches


def _shape_of(options: dict[str, Any]) -> str:
    kind = "dense" if "SIZE" in options else "short" if options["ROWS"] > 1 else "long"
    return kind if options["ALIGNED"] else f"{kind}, unaligned"


@cache
def launches(target: str, dtype: torch.dtype, setting: str) -> list[Launch]:
    found = launches_of_a_step(TARGETS[target], dtype, list(SHAPES), SETTINGS[setting])
    kernels = ["step", "squares"] if SETTINGS[setting].everything else ["step"]
    expected = {(kernel, shape) for kernel in kernels for shape in SHAPES}
    assert {(launch.kernel.split("_")[1], launch.shape) for launch in found} == expected
    return found
