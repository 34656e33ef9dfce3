"""The kernels of the GPU backends on the parts of two ranks: the bits of the same kernels in one process.

The CUDA sources are compiled for the CPU, and Triton interprets.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from backends import emulate
from old_pytorch import needs_fsdp2
from ranks import on_ranks
from sharded_training import CASES, Case, support_path, train

pytestmark = [pytest.mark.slow, needs_fsdp2]

OF_CUDA = ("changed by hand", "norm over all positions, HAM", "SET, min_fan_in", "bfloat16", "float64")
OF_TRITON = ("changed by hand",)


def on_backend(case: Case, backend: str, steps: int) -> Case:
    return replace(case, steps=steps, options={**case.options, "backend": backend})


def train_on_two_ranks(
    folder: Path, names: tuple[str, ...], backend: str, steps: int, before: str = ""
) -> Any:
    script = f"""
sys.path[:0] = [{support_path()!r}]
{before}
from sharded_training import CASES, train
from test_gpu_kernels import on_backend
from torch.distributed.device_mesh import init_device_mesh

mesh = init_device_mesh("cpu", (ranks,))
result = {{n: train(on_backend(CASES[n], {backend!r}, {steps}), mesh) for n in {names!r}}}
"""
    return on_ranks(
        f"import sys\nsys.path[:0] = [{str(Path(__file__).parent)!r}]\n{script}", folder, seconds=400
    )[0]


def check_as_one_process(found: Any, backend: str, steps: int) -> None:
    for name, many in found.items():
        one = train(on_backend(CASES[name], backend, steps))
        for what in ("parameters", "buffers", "masks"):
            for a, b in zip(one[what], many[what], strict=True):
                assert torch.equal(a, b), (name, what)


def test_cuda(cuda_library: Path, cuda: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = f"""
import pytest
from pathlib import Path
from backends import emulate
from built_once import load

emulate(load(Path({str(cuda_library)!r})), pytest.MonkeyPatch())
"""
    found = train_on_two_ranks(tmp_path, OF_CUDA, "cuda", 24, before)
    emulate(cuda, monkeypatch)
    check_as_one_process(found, "cuda", 24)


@pytest.mark.interpreted
def test_triton(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    check_as_one_process(train_on_two_ranks(tmp_path, OF_TRITON, "triton", 8), "triton", 8)
