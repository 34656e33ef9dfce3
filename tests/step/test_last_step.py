"""The shortest way of a step: which steps go it, and that they are those of the long way, bit for bit."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from backends import INTERPRETED
from counted_steps import Run
from side_by_side import same_bits
from torch import Tensor
from torch.nn.parameter import Parameter

from sparseopt_kernels.kernels.contract import Inputs
from sparseopt_kernels.kernels.cpu import CpuPlan
from sparseopt_kernels.optimizer import SparseOpt
from sparseopt_kernels.step import change_detection, last_step

pytestmark = [
    pytest.mark.skipif(
        change_detection.READER is None, reason="there is no native library that can read tensors"
    ),
    pytest.mark.skipif(INTERPRETED, reason="nothing here is Triton's"),
]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "without-momentum": {"momentum": 0.0},
    "nesterov": {"nesterov": True, "maximize": True, "weight_decay": 0.1},
    "dampening": {"dampening": 0.5, "weight_decay": 1},
    "ham": {"ham_alpha": 80.0, "ham_beta": 0.1},
    "unnormalized": {"correction": "unnormalized"},
    "clip": {"max_grad_norm": 0.5},
    "clip-that-leaves-all": {"max_grad_norm": 1e6},
    "clip-over-all-positions": {"max_grad_norm": 1, "max_grad_norm_over": "dense"},
    "bfloat16": {"dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64},
}


@pytest.fixture(params=["short", "long"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "long":
        monkeypatch.setattr(last_step, "_native_step", lambda *_: None)
    return str(request.param)


def both_ways(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, pytest.MonkeyPatch]]:
    """The name of each way, and a patch that holds while it is gone."""
    for way in ("short", "long"):
        with monkeypatch.context() as patch:
            if way == "long":
                patch.setattr(last_step, "_native_step", lambda *_: None)
            yield way, patch


@pytest.mark.parametrize("options", OPTIONS)
def test_most_steps_go_it_and_are_the_same(options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    short = Run(monkeypatch, **OPTIONS[options])
    looks = [short.step() for _ in range(6)]
    # The first finds no buffers; with dampening, it has a rule of its own.
    assert looks[2:] == [0] * 4
    assert (looks[1] == 0) == ("dampening" not in OPTIONS[options])
    with monkeypatch.context() as patch:
        patch.setattr(last_step, "_native_step", lambda *_: None)
        long = Run(patch, **OPTIONS[options])
        assert [long.step() for _ in range(6)][2:] == [1] * 4
    for a, b in zip(short.tensors(), long.tensors(), strict=True):
        assert same_bits(a, b)


def test_auto_goes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = []
    for way, patch in both_ways(monkeypatch):
        run = Run(patch)
        feeding = {"0": run.params[0]}
        groups = [{"params": run.params[:2]}, {"params": run.params[2:]}]
        run.optimizer = SparseOpt(
            groups,
            lr=0.1,
            momentum=0.9,
            masks=run.masks,
            correction="auto",
            feeding_norm=feeding,
            max_grad_norm=0.5,
            backend="cpu",
        )
        run.settle()
        assert run.step() == (way == "long")
        ways.append(run.tensors())
    for a, b in zip(*ways, strict=True):
        assert same_bits(a, b)


def _write(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(tensor.clone())


ONCE: dict[str, Callable[[Run], object]] = {
    "mask-written": lambda run: _write(run.masks[run.params[0]]),
    "weight-written": lambda run: _write(run.params[0]),
    "mask-replaced": lambda run: run.masks.update({run.params[0]: run.masks[run.params[0]].clone()}),
    "mask-gone": lambda run: run.masks.pop(run.params[0]),
    "momentum-off": lambda run: run.optimizer.param_groups[0].update(momentum=0.0),
    "correction": lambda run: run.optimizer.param_groups[0].update(correction="none"),
    "new-group": lambda run: run.optimizer.add_param_group({"params": [Parameter(torch.ones(3))]}),
    "weight-moved": lambda run: setattr(run.params[0], "data", run.params[0].data.clone()),
    "buffer-written": lambda run: _write(run.optimizer.state[run.params[0]]["momentum_buffer"]),
    "buffer-replaced": lambda run: run.optimizer.state[run.params[0]].update(
        momentum_buffer=torch.zeros(8, 5)
    ),
    "state-popped": lambda run: run.optimizer.state.pop(run.params[1]),
    "moved-to-another-group": lambda run: run.optimizer.param_groups[1]["params"].append(
        run.optimizer.param_groups[0]["params"].pop()
    ),
    "state-loaded": lambda run: run.optimizer.load_state_dict(run.optimizer.state_dict()),
}


@pytest.mark.parametrize("change", ONCE)
def test_a_change_takes_the_long_way_once(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch).settle()
    assert run.step() == 0
    ONCE[change](run)
    assert run.step() > 0
    run.step()  # a buffer may be new
    assert run.step() == 0


def test_a_gradient_that_comes_and_goes(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch).settle()
    p, q = run.params[:2]
    before = p.detach().clone()
    p.grad, q.grad = None, torch.ones(7)
    run.optimizer.step()
    assert torch.equal(p, before)
    p.grad = torch.ones(8, 5)
    run.optimizer.step()
    assert not torch.equal(p, before)


@pytest.mark.parametrize("change", ["mask", "weight"])
@pytest.mark.parametrize("is_first", [False, True])
def test_a_change_during_a_step_is_seen_by_the_next(
    is_first: bool, change: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another thread, say: it is not taken for what the step was prepared for."""
    run = Run(monkeypatch) if is_first else Run(monkeypatch).settle()
    p = run.params[0]
    step = CpuPlan.step

    def disturbed(plan: CpuPlan, inputs: Inputs) -> None:
        step(plan, inputs)
        if change == "mask":
            run.masks[p].zero_()
        else:
            p.data = torch.ones(8, 5)

    _write(p)  # the next step goes the long way
    with monkeypatch.context() as patch:
        patch.setattr(CpuPlan, "step", disturbed)
        run.step()
    run.step()
    if change == "mask":
        assert not p.any()
    else:
        assert not p[~run.masks[p]].any()
        assert p[run.masks[p]].ne(1).all()


@pytest.mark.parametrize("reference", ["attribute", "hook"])
def test_an_optimizer_that_its_parameter_refers_to_can_be_freed(reference: str) -> None:
    p = Parameter(torch.ones(3, 4))
    p.grad = torch.ones(3, 4)
    masks = {p: torch.ones(3, 4, dtype=torch.bool)}
    optimizer = SparseOpt([p], lr=0.1, momentum=0.9, masks=masks, backend="cpu")
    for _ in range(4):
        optimizer.step()
    assert optimizer._last.is_repeatable
    if reference == "attribute":
        p.owner = [optimizer]  # type: ignore[attr-defined]
    else:
        p.register_hook(lambda gradient, kept=optimizer: None)
    freed = weakref.ref(optimizer)
    del optimizer, p, masks
    gc.collect()
    assert freed() is None


ALWAYS: dict[str, Callable[[Run], object]] = {
    "lr-tensor": lambda run: run.optimizer.param_groups[0].update(lr=torch.tensor(0.1)),
    "max-grad-norm-tensor": lambda run: run.optimizer.param_groups[1].update(max_grad_norm=torch.tensor(1.0)),
    "grad-scale": lambda run: setattr(run.optimizer, "grad_scale", torch.tensor(2.0)),
    "found-inf": lambda run: setattr(run.optimizer, "found_inf", torch.tensor(0.0)),
}


@pytest.mark.parametrize("option", ALWAYS)
def test_what_takes_more_than_the_native_library(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch).settle()
    ALWAYS[option](run)
    assert [run.step() > 0 for _ in range(3)] == [True] * 3


def test_hyperparameters_may_change_at_any_step(monkeypatch: pytest.MonkeyPatch) -> None:
    changes: list[dict[str, Any]] = [
        {"lr": 0.2},
        {"momentum": 0.5},
        {"weight_decay": 0.1},
        {"nesterov": True},
        {"maximize": True},
        {"ham_alpha": 80.0},
        {"ham_beta": 0.5},
        {"nesterov": False},
        {"dampening": 0},
        {"max_grad_norm": 0.5},
        {"max_grad_norm": 2},
        {"max_grad_norm": None},
    ]
    found = []
    for way, patch in both_ways(monkeypatch):
        run = Run(patch).settle()
        for change in changes:
            run.optimizer.param_groups[0].update(change)
            assert run.step() == (way == "long")
        found.append(run.tensors())
    for a, b in zip(*found, strict=True):
        assert same_bits(a, b)


def test_a_norm_that_is_no_number(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A coefficient of NaN reaches every weight, as in the long way; an infinite norm makes it 0."""
    for value, want in ((math.nan, math.nan), (math.inf, 0.0)):
        run = Run(monkeypatch, momentum=0.0, max_grad_norm=1.0).settle()
        p, other = run.params[1], run.params[0]
        before = p.detach().clone()
        for q in run.params[:3]:
            q.grad = torch.ones_like(q)
        assert other.grad is not None
        other.grad[run.masks[other]] = value
        run.optimizer.step()
        moved = p.detach() - before
        assert moved.isnan().all() if math.isnan(want) else torch.equal(moved, torch.zeros(7))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_limit_by_infinity(way: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, momentum=0.0, max_grad_norm=math.inf).settle()
    p = run.params[1]
    before = p.detach().clone()
    for q in run.params[:3]:
        q.grad = torch.ones_like(q)
    p.grad[2] = value  # type: ignore[index]
    run.optimizer.step()
    others = torch.arange(7) != 2
    assert torch.equal(p[others], torch.addcmul(before, torch.ones(7), torch.tensor(-0.1))[others])


@pytest.mark.parametrize("limit", [0, 0.0, -1.0, math.nan])
def test_a_bad_limit_is_an_error_at_any_step(way: str, limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch).settle()
    run.optimizer.param_groups[1]["max_grad_norm"] = limit
    before = run.tensors()
    with pytest.raises(ValueError, match=r"max_grad_norm is .*, it must be a number > 0"):
        run.step()
    assert all(map(same_bits, run.tensors(), before))


def test_limits_of_two_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for way, patch in both_ways(monkeypatch):
        run = Run(patch).settle()
        run.optimizer.param_groups[1]["max_grad_norm"] = 0.25
        assert [run.step() for _ in range(2)] == [int(way == "long")] * 2
        run.optimizer.param_groups[0]["max_grad_norm"] = 4.0
        run.step()
        found.append(run.tensors())
    for a, b in zip(*found, strict=True):
        assert same_bits(a, b)


def test_other_numbers_for_a_learning_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, momentum=0.0).settle()
    p = run.params[1]
    for lr in (1.0, 2, 0.0, np.float64(0.25), True):
        run.optimizer.param_groups[0]["lr"] = lr
        before = p.detach().clone()
        assert run.step() == 0
        assert p.grad is not None
        assert torch.equal(p, torch.addcmul(before, p.grad, torch.tensor(-float(lr))))


def test_a_negated_gradient(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, momentum=0.0).settle()
    p = run.params[1]
    before = p.detach().clone()
    p.grad = torch._neg_view(torch.ones(7))  # laid out as the gradient before
    run.optimizer.step()
    assert torch.equal(p, before + torch.tensor(0.1))


def test_a_gradient_in_another_memory_format_in_all_steps(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, momentum=0.0)
    p = run.params[2]
    for _ in range(4):
        before = p.detach().clone()
        p.grad = torch.randn(p.shape).to(memory_format=torch.channels_last)
        run.optimizer.step()
        want = torch.addcmul(before, p.grad, torch.tensor(-0.3)) * run.masks[p]
        torch.testing.assert_close(p.detach(), want)


def test_a_verdict_of_amp(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch).settle()
    before = run.tensors()
    run.optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    run.step()
    for a, b in zip(run.tensors(), before, strict=True):
        assert same_bits(a, b)
    del run.optimizer.found_inf  # type: ignore[attr-defined]
    run.step()
    assert not torch.equal(run.params[0], before[0])


def test_after_a_first_step_that_amp_skipped(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its buffers are put into the state by the step that is made."""
    run = Run(monkeypatch)
    run.optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    run.step()
    del run.optimizer.found_inf  # type: ignore[attr-defined]
    run.step()
    assert all("momentum_buffer" in run.optimizer.state[p] for p in run.params[:3])


@pytest.mark.parametrize("options", [{}, {"dampening": 0.5}], ids=["momentum", "dampening"])
def test_a_state_that_is_cleared_after_the_first_step(
    options: dict[str, Any], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after any other: the next step is a first one, with buffers of its own."""
    cleared, again = Run(monkeypatch, **options), Run(monkeypatch, **options)
    for run in (cleared, again):
        run.step()
    cleared.optimizer.state.clear()
    again.optimizer.load_state_dict({**again.optimizer.state_dict(), "state": {}})
    for run in (cleared, again):
        run.step()
    for a, b in zip(cleared.tensors(), again.tensors(), strict=True):
        assert same_bits(a, b)


def test_gradients_are_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch).settle()
    assert run.step() == 0
    gradient = run.params[0].grad
    assert gradient is not None
    held = weakref.ref(gradient)
    run.optimizer.zero_grad()
    del gradient
    assert held() is None


def test_a_copy_goes_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch).settle()
    before = run.tensors()
    other = copy.deepcopy(run.optimizer)
    for p in other.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    for _ in range(3):
        other.step()
    for a, b in zip(run.tensors(), before, strict=True):
        assert same_bits(a, b)


def test_autograd_notices(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch).settle()
    loss = (run.params[1] ** 2).sum()
    assert run.step() == (way == "long")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
