"""The step that follows an update of the masks is left out: when, and when not."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import Backend
from side_by_side import same_bits
from topology_training import BOTH, EVERY, Training
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from sparseopt_kernels import skipped_steps
from sparseopt_kernels.finished.finalize import finalize
from sparseopt_kernels.optimizer import SparseOpt
from sparseopt_kernels.schedules import warmup_cosine
from sparseopt_kernels.skipped_steps import PENDING
from sparseopt_kernels.topology.gmp import GMP
from sparseopt_kernels.topology.rigl import RigL
from sparseopt_kernels.topology.set import SET


def published_rigl(training: Training, steps: int) -> list[list[Tensor]]:
    """RigL as published: where the masks are updated, no weight is (Evci et al. 2020, Algorithm 1: "else").

    Returns:
        After each step, all parameters and masks.
    """
    model, masks = training.model, dict(training.masks)
    buffers: dict[Parameter, Tensor] = {}
    trace = []
    for t in range(1, steps + 1):
        training.backward()
        with torch.no_grad():
            if t % EVERY == 0:
                fraction = 0.3 / 2 * (1 + math.cos(math.pi * t / 100))
                for p, mask in masks.items():
                    active = int(mask.sum())
                    k = int(fraction * active)
                    order = p.abs().masked_fill(~mask, -1.0).flatten().argsort(descending=True, stable=True)
                    kept = torch.zeros_like(mask)
                    kept.view(-1)[order[: active - k]] = True
                    gradient = p.grad.abs().masked_fill(kept, -1.0)  # type: ignore[union-attr]
                    grown = kept.clone()
                    grown.view(-1)[gradient.flatten().argsort(descending=True, stable=True)[:k]] = True
                    p.mul_(mask & grown)
                    buffers[p].mul_(mask & grown)
                    mask.copy_(grown)
            else:
                for p in model.parameters():
                    assert p.grad is not None
                    d = p.grad * masks.get(p, torch.tensor(1.0)) + 0.01 * p
                    buffers[p] = d if p not in buffers else 0.9 * buffers[p] + d
                    p.sub_(0.1 * buffers[p])
        trace.append([t.detach().clone() for t in (*model.parameters(), *masks.values())])
    return trace


def test_thirty_steps_of_rigl_as_published(backend: Backend) -> None:
    if backend.is_slow:
        pytest.skip("30 steps take long, and others show what a step does")
    expected = published_rigl(Training(), 30)
    training = Training(backend=backend.name, correction="none")
    for wanted in expected:
        training.backward()
        training.dst.step()
        training.opt.step()
        found = [*training.model.parameters(), *training.masks.values()]
        for got, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(got.detach(), want, rtol=1e-9, atol=1e-12)


@BOTH
@pytest.mark.parametrize("limit", [None, 1.0])
def test_the_masks_are_applied_and_nothing_else(backend: Backend, cls: type, limit: float | None) -> None:
    training = Training(cls, backend.name, max_grad_norm=limit, nesterov=True)
    training.to_update()
    assert training.dst.updated
    assert training.dst.skip_next
    before = training.state()
    assert not training.steps(training.opt.step)
    assert not all(map(same_bits, training.state(), before))  # momentum of what was dropped
    assert training.steps(training.opt.step)  # the second time it is a step


@BOTH
def test_without_skip_step_every_step_moves_weights(cls: type) -> None:
    """``skip_step=False`` is the same, bit for bit, as to call the optimizer again after a step left out."""
    states = []
    for skip_step in (False, True):
        training = Training(cls, skip_step=skip_step)
        for _ in range(4 * EVERY):
            training.backward()
            training.dst.step()
            if training.dst.skip_next:
                training.opt.step()
            training.opt.step()
        states.append(training.state())
    assert all(map(same_bits, *states))


def test_a_users_own_change_costs_no_step() -> None:
    training = Training()
    training.to_update()
    training.opt.step()
    with torch.no_grad():
        for mask in training.masks.values():
            mask.copy_(mask.roll(1, 0))
    training.backward()
    training.dst.step()
    assert training.steps(training.opt.step)


def test_an_update_in_which_all_weights_grow_again() -> None:
    training = Training()
    for p, mask in training.masks.items():
        p.register_hook(lambda gradient, mask=mask: gradient.masked_fill(mask, 1e6))
    training.to_update()
    assert not training.dst.updated
    assert training.dst.skip_next
    assert not training.steps(training.opt.step)


@BOTH
def test_a_postponed_update(cls: type) -> None:
    training = Training(cls)
    weight = next(iter(training.masks))
    training.dst.step()
    training.dst.step()
    training.backward()
    assert weight.grad is not None
    good = weight.grad.clone()
    weight.grad[0, 0] = math.inf
    training.dst.step()
    assert not training.dst.skip_next
    weight.grad.copy_(good)
    assert training.steps(training.opt.step)
    training.backward()
    training.dst.step()
    assert training.dst.skip_next
    assert not training.steps(training.opt.step)


def test_frozen_layers_cost_no_step() -> None:
    training = Training(SET)
    for p in training.masks:
        p.requires_grad_(False)
    training.to_update()
    assert not training.dst.skip_next
    bias = training.model.get_parameter("3.bias").detach().clone()
    training.opt.step()
    assert not torch.equal(training.model.get_parameter("3.bias"), bias)


def test_a_topology_that_is_stepped_in_the_closure() -> None:
    training = Training()
    for _ in range(EVERY - 1):
        training.backward()
        training.dst.step()
        training.opt.step()
    expected: list[list[Tensor]] = []
    losses = []

    def closure() -> float:
        losses.append(float(training.backward()))
        training.dst.step()
        expected.append(training.masked_state())
        return losses[-1]

    assert training.opt.step(closure) == losses[0]
    assert all(map(same_bits, training.state(), expected[0]))


def test_a_step_that_the_script_leaves_out_itself() -> None:
    """It does not lose two: what was not used ends at the next step of the topology."""
    training = Training()
    training.to_update()  # and no step of the optimizer
    training.backward()
    training.dst.step()
    assert not training.dst.skip_next
    assert training.steps(training.opt.step)


def test_without_its_topology_nothing_is_left_out() -> None:
    training = Training()
    training.to_update()
    del training.dst
    gc.collect()
    assert training.steps(training.opt.step)


def test_masks_that_are_gone_do_not_disturb_others() -> None:
    """A model is finalized, and a layer replaced, while a step is to be left out: another one trains on."""
    training, other = Training(), Training()
    training.to_update()
    finalize(training.model)
    training.model[0] = nn.Linear(12, 16)
    other.backward()
    assert other.steps(other.opt.step)
    alone = SparseOpt([p := Parameter(torch.zeros(2))], lr=1.0, masks={})
    p.grad = torch.ones(2)
    alone.step()
    assert p.tolist() == [-1.0, -1.0]


def test_nothing_is_kept_alive() -> None:
    training = Training()
    training.to_update()
    training.opt.step()
    assert len(PENDING) >= 1
    freed = weakref.ref(training.opt)
    del training.opt
    gc.collect()
    assert freed() is None
    before = len(PENDING)
    del training.dst
    gc.collect()
    assert len(PENDING) == before - 1


def test_an_overflow_uses_it_up(backend: Backend) -> None:
    training = Training(backend=backend.name)
    training.to_update()
    training.opt.__dict__["found_inf"] = torch.tensor(1.0)
    assert not training.steps(training.opt.step)
    del training.opt.__dict__["found_inf"]
    assert training.steps(training.opt.step)


def test_schedulers_and_hooks_count_it() -> None:
    training = Training()
    schedule = warmup_cosine(training.opt, 5, 20)
    calls: list[str] = []
    training.opt.register_step_pre_hook(lambda *_: calls.append("before"))
    training.opt.register_step_post_hook(lambda *_: calls.append("after"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2 * EVERY):
            training.backward()
            training.dst.step()
            training.opt.step()
            schedule.step()
    assert calls == ["before", "after"] * 2 * EVERY
    assert schedule.last_epoch == 2 * EVERY


def test_in_the_capture_of_a_graph_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training()
    training.to_update()
    before = training.state()
    monkeypatch.setattr(skipped_steps, "capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"left out \(skip_step\).*this step and the next outside"):
        training.opt.step()
    assert all(map(same_bits, training.state(), before))
    monkeypatch.undo()
    assert not training.steps(training.opt.step)
    monkeypatch.setattr(skipped_steps, "capturing", lambda: True)
    training.opt.step()


def test_gmp_leaves_no_step_out() -> None:
    training = Training()
    training.dst = GMP(training.masks, 0.9, 1, stop_at=3)
    for _ in range(3):
        training.backward()
        training.dst.step()
        assert training.dst.updated
        assert not training.dst.skip_next
        assert training.steps(training.opt.step)


class TestArguments:
    @BOTH
    @pytest.mark.parametrize("value", [None, 1, "yes"])
    def test_bad_values(self, cls: type, value: object) -> None:
        with pytest.raises(TypeError, match=f"skip_step is {value!r}, it must be True or False"):
            Training(cls, skip_step=value)  # type: ignore[arg-type]

    @pytest.mark.parametrize("every", [1, 2])
    def test_three_updates_in_a_row(self, every: int) -> None:
        training = Training()
        training.dst.update_every = every  # as a state that is loaded may have it
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(6):
                training.backward()
                training.dst.step()
                training.opt.step()
        said = [str(own.message) for own in caught if "three steps in a row" in str(own.message)]
        assert len(said) == (every == 1)

    def test_that_it_is_said_once(self) -> None:
        training = Training()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            training.dst = RigL(training.masks, 0.3, 1, stop_at=100)
            for _ in range(4):
                training.backward()
                training.dst.step()
        assert len([own for own in caught if "skip_step" in str(own.message)]) == 1

    @BOTH
    def test_an_update_in_every_step_trains_nothing(self, cls: type) -> None:
        masks = Training().masks
        with pytest.warns(UserWarning, match="nothing is trained"):
            cls(masks, update_every=1, stop_at=10)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            cls(masks, update_every=1, stop_at=10, skip_step=False)

    @BOTH
    def test_what_is_shown(self, cls: type) -> None:
        assert "skip_step" not in repr(Training(cls).dst)
        assert "skip_step=False" in repr(Training(cls, skip_step=False).dst)


class TestState:
    @BOTH
    def test_it_is_part_of_it(self, cls: type) -> None:
        state = Training(cls, skip_step=False).dst.state_dict()
        training = Training(cls)
        training.dst.load_state_dict(state)
        training.to_update()
        assert not training.dst.skip_next
        assert training.steps(training.opt.step)

    @BOTH
    def test_one_from_before_is_without(self, cls: type) -> None:
        state = Training(cls).dst.state_dict()
        del state["skip_step"]
        training = Training(cls)
        with pytest.warns(UserWarning, match="no skip_step: it is False from here on, and not True"):
            training.dst.load_state_dict(state)
        assert training.dst.skip_step is False
        training = Training(cls, skip_step=False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            training.dst.load_state_dict(state)

    def test_loading_ends_a_pending_one(self) -> None:
        training = Training()
        state = training.dst.state_dict()
        training.to_update()
        training.dst.load_state_dict(state)
        assert not training.dst.skip_next
        assert training.steps(training.opt.step)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda own: pickle.loads(pickle.dumps(own))])
    def test_a_copy_has_none(self, copied: Callable[[Any], Any]) -> None:
        training = Training()
        training.to_update()
        model, opt, dst = copied((training.model, training.opt, training.dst))
        assert not dst.skip_next
        assert dst.skip_step
        before = [p.detach().clone() for p in model.parameters()]
        for p, own in zip(model.parameters(), training.model.parameters(), strict=True):
            p.grad = None if own.grad is None else own.grad.clone()
        opt.step()
        assert not any(map(same_bits, [p.detach() for p in model.parameters()], before))
        assert training.dst.skip_next
        assert not training.steps(training.opt.step)
