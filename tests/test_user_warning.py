"""Warnings point at the user's line, whatever lies between it and this package."""

from __future__ import annotations

import inspect
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim import lr_scheduler

from sparseopt_kernels import RigL, SparseOpt, kernels, layer_densities, native_library, sparsify
from sparseopt_kernels.masks.mapping import Masks
from sparseopt_kernels.user_warning import warn

ROOT = Path(__file__).parents[1]
FAN_IN = "fan-in is concentrated"


def line_before() -> int:
    """The number of the line before the caller's."""
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return frame.f_back.f_lineno - 1


@contextmanager
def one_warning(words: str) -> Iterator[list[int]]:
    """One warning with these words, in the line of this file that the block puts into the list."""
    lines: list[int] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lines
    found = [w for w in caught if words in str(w.message)]
    assert [(w.filename, w.lineno) for w in found] == [(__file__, line) for line in lines]


def concentrated(**options: Any) -> tuple[nn.Linear, SparseOpt]:
    """A layer in which one neuron has most of the weights, and its optimizer, which has not stepped yet."""
    model = nn.Linear(64, 32, bias=False)
    mask = torch.zeros(32, 64, dtype=torch.bool)
    mask[0], mask[:, 0] = True, True
    model.register_buffer("weight_mask", mask)
    model.weight.grad = torch.ones_like(model.weight)
    return model, SparseOpt(model.parameters(), lr=0.1, masks=Masks(model), **options)


def test_a_plain_step() -> None:
    _, optimizer = concentrated()
    with one_warning(FAN_IN) as lines:
        optimizer.step()
        lines.append(line_before())


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "one": lambda o: lr_scheduler.StepLR(o, 1),
    "two": lambda o: [lr_scheduler.StepLR(o, 1), lr_scheduler.ExponentialLR(o, 0.9)],
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [1]
    ),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_through_a_scheduler_that_patches_the_step(scheduler: str) -> None:
    _, optimizer = concentrated()
    kept = SCHEDULERS[scheduler](optimizer)
    with one_warning(FAN_IN) as lines:
        optimizer.step()
        lines.append(line_before())
    del kept


def test_through_a_grad_scaler() -> None:
    _, optimizer = concentrated()
    kept = lr_scheduler.StepLR(optimizer, 1)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))  # makes the scale
    with one_warning(FAN_IN) as lines:
        scaler.step(optimizer)
        lines.append(line_before())
    del kept


def test_through_hooks_and_no_grad() -> None:
    _, optimizer = concentrated()
    optimizer.register_step_pre_hook(lambda *_: None)

    @torch.no_grad()
    def train() -> int:
        optimizer.step()
        return line_before()

    with one_warning(FAN_IN) as lines:
        lines.append(train())


@pytest.mark.slow
@pytest.mark.parametrize("scheduled", [False, True])
def test_from_a_compiled_function(scheduled: bool) -> None:
    testing = pytest.importorskip("torch._dynamo.testing")
    torch._dynamo.reset()
    _, optimizer = concentrated()
    kept = lr_scheduler.StepLR(optimizer, 1) if scheduled else None

    def train(x: torch.Tensor) -> torch.Tensor:
        y = x.sum()
        optimizer.step()
        return y * 2

    compiled = torch.compile(train, backend=testing.CompileCounter())
    with one_warning(FAN_IN) as lines:
        compiled(torch.ones(2))
        lines.append(inspect.getsourcelines(train)[1] + 2)
    del kept


@pytest.mark.slow
def test_from_a_compiled_step() -> None:
    testing = pytest.importorskip("torch._dynamo.testing")
    torch._dynamo.reset()
    _, optimizer = concentrated()
    step = torch.compile(optimizer.step, backend=testing.CompileCounter())
    with one_warning(FAN_IN) as lines:
        step()
        lines.append(line_before())


def test_of_a_slow_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_library, "MISSING", "the native library was not built")
    monkeypatch.delenv("SPARSEOPT_BACKEND", raising=False)
    kernels._say_once.cache_clear()
    parameter = nn.Parameter(torch.ones(4, 4))
    with one_warning("slow reference backend") as lines:
        SparseOpt([parameter], lr=0.1)
        lines.append(line_before())
    kernels._say_once.cache_clear()


def test_of_a_schedule_that_never_updates() -> None:
    model = nn.Linear(8, 8)
    masks = sparsify(model, 0.5)
    with one_warning("the masks will never change") as lines:
        RigL(masks, update_every=10, stop_at=5)
        lines.append(line_before())


def test_of_a_layer_that_is_left_out() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    with one_warning("layer '0' is left out") as lines:
        layer_densities(model, 0.5)
        lines.append(line_before())
    with one_warning("layer '0' is left out") as lines:
        sparsify(model, 0.5)
        lines.append(line_before())


def test_of_a_mask_that_is_left_out() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    sparsify(model, 0.5)
    parametrizations.weight_norm(model[0])
    with one_warning("a mask is left out") as lines:
        Masks(model)
        lines.append(line_before())


def test_without_any_line_of_the_user_it_is_shown_all_the_same() -> None:
    """``python -m`` of a module of this package has no frame of the user's."""
    script = "import sparseopt_kernels.user_warning as u; u._FOREIGN += ('<string>',); u.warn('invented')"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "UserWarning: invented" in run.stderr


def test_from_a_users_own_function() -> None:
    def library() -> None:
        warn("invented", DeprecationWarning)

    with one_warning("invented") as lines:
        library()
        lines.append(inspect.getsourcelines(library)[1] + 1)
