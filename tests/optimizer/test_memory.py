"""No step holds or makes memory that it does not need."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from backends import Backend
from oracle import Hyper
from torch.nn.parameter import Parameter
from watched import optimizer_of, random_mask

from sparseopt_kernels.optimizer import SparseOpt


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
def test_zero_grad_frees_the_gradients(backend: Backend, masked: bool) -> None:
    """Nothing that is kept from step to step holds a gradient."""
    p = Parameter(torch.ones(4, 9))
    masks = {p: random_mask((4, 9))} if masked else {}
    optimizer = optimizer_of(backend, [p], masks)
    for _ in range(3):
        p.grad = torch.ones(4, 9)
        grad = weakref.ref(p.grad)
        optimizer.step()
        optimizer.zero_grad()
        gc.collect()
        assert grad() is None


LARGE = (4, 1_000_000)  # 16 MB in float32


def large_optimizer(backend: Backend, pattern: str | None) -> tuple[Parameter, SparseOpt, dict]:
    parameter = Parameter(torch.ones(LARGE))
    parameter.grad = torch.ones(LARGE)
    masks = {} if pattern is None else {parameter: random_mask(LARGE, pattern=pattern)}
    rule = Hyper(lr=0.1, momentum=0.9, weight_decay=0.01, max_grad_norm=1.0)
    optimizer = optimizer_of(backend, [parameter], masks, rule)
    optimizer.step()  # the first step makes the momentum buffer
    optimizer.step()
    return parameter, optimizer, masks


each_pattern = pytest.mark.parametrize("pattern", [None, "half", "sparse99"], ids=str)


@each_pattern
def test_no_temporary_as_large_as_a_parameter(backend: Backend, pattern: str | None) -> None:
    """What PyTorch allocates during a step of the native backend, and during one after a mask changed."""
    if backend.name == "reference" or backend.is_slow:
        pytest.skip("the reference is written to be read, and makes temporaries; so does an interpreter")
    parameter, optimizer, masks = large_optimizer(backend, pattern)
    for mask in (None, *masks.values()):
        if mask is not None:
            mask[0, :1000] = False
        with torch.profiler.profile(profile_memory=True) as profile:
            optimizer.step()
        allocated = [event.self_cpu_memory_usage for event in profile.events()]
        assert sum(size for size in allocated if size > 0) < parameter.nbytes / 2


@pytest.mark.slow
@each_pattern
def test_peak_memory_of_a_step(backend: Backend, pattern: str | None) -> None:
    """As the operating system sees it, so that C++ is counted too."""
    if backend.name == "reference" or backend.is_slow:
        pytest.skip("the reference is written to be read, and makes temporaries; so does an interpreter")
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        pytest.skip("peak memory can be reset on Linux only")
    parameter, optimizer, masks = large_optimizer(backend, pattern)

    def kilobytes(what: str) -> int:
        line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(what))
        return int(line.split()[1])

    for mask in (None, *masks.values()):
        if mask is not None:
            mask[0, :1000] = False
        gc.collect()
        try:
            reset.write_text("5")
        except OSError as error:
            pytest.skip(f"peak memory cannot be reset here: {error}")
        before = kilobytes("VmRSS")
        optimizer.step()
        assert (kilobytes("VmHWM") - before) * 1024 < parameter.nbytes / 2
