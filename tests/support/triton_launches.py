"""The launches of two steps, for GPUs that need not be here: the first one's are of masks that are new."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from sparseopt_kernels import SparseOpt
from sparseopt_kernels.kernels.gpu.triton import TritonKernels

pytest.importorskip("triton", reason="Triton is not installed")
from triton.backends.compiler import GPUTarget
from triton_code import compiled_by

NVIDIA = {f"sm_{n}": GPUTarget("cuda", n, 32) for n in (80, 90, 100)}
AMD = {"gfx942": GPUTarget("hip", "gfx942", 64)}
TARGETS = {**NVIDIA, **AMD}

# Masked rows of whole vectors and others, and dense tensors, of which a rest is no whole vector.
SHAPES = [(8, 64), (8, 27), (70,)]
STREAMS = ("step", "squares")


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
    aligned: bool
    grads_aligned: bool
    compiled: Any
    size: int  # bytes of a weight
    momentum: bool

    @property
    def name(self) -> str:
        if not self.aligned:
            return f"{self.kernel} (unaligned)"
        return self.kernel if self.grads_aligned else f"{self.kernel} (gradients unaligned)"

    @property
    def of_weights(self) -> bool:
        """Whether it reads weights or gradients, not only masks."""
        return self.kernel.endswith(STREAMS)

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


def launches_of_steps(
    target: GPUTarget,
    dtype: torch.dtype,
    setting: Setting,
    *,
    aligned: bool = True,
    grads_aligned: bool = True,
    **hyperparameters: Any,
) -> list[Launch]:
    """All launches of two steps, of which nothing runs, each kernel once.

    Args:
        aligned, grads_aligned: whether parameters, and gradients, begin at multiples of 16 bytes.
    """

    def parameter(shape: tuple[int, ...]) -> torch.nn.Parameter:
        def memory(offset: int) -> torch.Tensor:
            weights = torch.Size(shape).numel()
            return torch.ones(weights + 1, dtype=dtype)[offset:][:weights].view(shape)

        made = torch.nn.Parameter(memory(0 if aligned else 1))
        made.grad = memory(0 if grads_aligned else 1)
        return made

    def steps() -> None:
        found = [parameter(shape) for shape in SHAPES]
        masks = {p: torch.ones(p.shape, dtype=torch.bool) for p in found if p.ndim > 1}
        numbers = {"lr": 0.1, "momentum": setting.momentum, **hyperparameters}
        groups: list[Any] = [{"params": found}]
        if setting.everything:
            groups = [{"params": found[:2]}, {"params": found[2:]}]
            numbers = {"ham_alpha": 1.0, "max_grad_norm": 1.0, **numbers}
            numbers["lr"] = torch.tensor(numbers["lr"])
        optimizer = SparseOpt(groups, masks=masks, backend="triton", **numbers)
        if setting.everything:
            optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.zeros(())  # type: ignore
        optimizer.step()
        optimizer.step()

    by_kernel: dict[Any, Launch] = {}
    tiles = {"chunk": target.warp_size, "rows": target.warp_size // TritonKernels.units}
    with patch.multiple(TritonKernels, **tiles):
        found = compiled_by(steps, target)
    for name, constants, compiled in found:
        are_aligned = constants.get("ALIGNED", True), constants.get("GRADS_ALIGNED", True)
        launch = Launch(name, *are_aligned, compiled, dtype.itemsize, constants.get("MOMENTUM", False))
        by_kernel.setdefault(compiled, launch)
    return [*by_kernel.values()]


@cache
def launches(target: str, dtype: torch.dtype, setting: str) -> list[Launch]:
    """Those of aligned tensors, of others, and of those whose gradients alone are not."""
    found = [
        launch
        for aligned, grads_aligned in ((True, True), (False, False), (True, False))
        for launch in launches_of_steps(
            TARGETS[target], dtype, SETTINGS[setting], aligned=aligned, grads_aligned=grads_aligned
        )
    ]
    kinds = ["sector_step", *(["sector_squares"] if SETTINGS[setting].everything else [])]
    expected = {"count_rows", "list_sectors", "masked_step", "masked_step (unaligned)"}
    expected |= {f"{k}{which}" for k in kinds for which in ("", " (unaligned)", " (gradients unaligned)")}
    assert {launch.name for launch in found} == expected
    return found
