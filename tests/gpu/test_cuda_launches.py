"""What a step of the CUDA backend costs the host: launches, and nothing that is copied. The CUDA sources run
on the CPU, and every operation of PyTorch itself is seen."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from backends import emulate
from cuda_on_cpu.build import compiler
from networks import RESNET50
from operations import Operations
from parameters import move_gradients, parameters_and_masks

from sparseopt_kernels.optimizer import SparseOpt

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")


@pytest.fixture
def count(cuda: ModuleType, cuda_library: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many launches there were."""
    emulate(cuda, monkeypatch)
    counter = ctypes.CDLL(str(cuda_library)).cuda_on_cpu_launches
    counter.restype = ctypes.c_int64
    return counter


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:]
)
def test_a_step_is_one_launch(count: Callable[[], int], dtype: torch.dtype) -> None:
    """Of tensors with and without masks, whatever their rows and where gradients have moved to."""
    shapes = [(7, 64), (5, 27), (9,), (3, 200), (1,)]
    parameters, masks = parameters_and_masks(shapes, dtype)
    optimizer = SparseOpt(parameters, lr=0.5, masks=masks, backend="cuda")
    before = count()
    optimizer.step()
    # Two that make lists, of all masks; what has one; what has none; and, for nothing, what the next step
    # launches.
    assert count() - before == 2 + 1 + 1 + 1
    optimizer.step()
    kept = move_gradients(parameters)
    parameters[0].grad = torch.ones(7 * 64 + 1, dtype=dtype)[1:].view(7, 64)  # alone is not aligned
    before = count()
    with Operations() as operations:
        optimizer.step()
    assert count() - before == 1
    assert not operations.counts
    assert all((p == -1.5).all() for p in parameters)
    assert len(kept) == len(shapes)


def test_a_resnet50_is_one_launch(count: Callable[[], int]) -> None:
    """Of 161 tensors: here, each with one row."""
    rows = [(1, *shape[1:]) if len(shape) > 1 else shape for shape in RESNET50]
    parameters, masks = parameters_and_masks(rows)
    optimizer = SparseOpt(parameters, lr=0.1, momentum=0.9, masks=masks, backend="cuda")
    optimizer.step()
    for _ in range(2):
        before = count()
        optimizer.step()
        assert count() - before == 1
    assert len(parameters) == 161


def test_launches_take_so_many_tensors_and_groups(cuda: ModuleType, count: Callable[[], int]) -> None:
    limit = cuda.MOST_TENSORS
    for tensors, groups, expected in ((1, 1, 1), (limit, 1, 1), (limit + 1, 1, 2), (9, 8, 1), (9, 9, 2)):
        parameters, masks = parameters_and_masks([(2, 16)] * tensors)
        split = [{"params": parameters[i::groups]} for i in range(groups)]
        optimizer = SparseOpt(split, lr=0.5, momentum=0.9, masks=masks, backend="cuda")
        for p in parameters:
            p.grad = torch.zeros_like(p)
        for _ in range(2):
            optimizer.step()
        for p in parameters:
            p.grad = torch.ones_like(p)
        before = count()
        with Operations() as operations:
            optimizer.step()
        assert count() - before == expected
        assert not operations.counts
        assert all((p == -0.5).all() for p in parameters)
