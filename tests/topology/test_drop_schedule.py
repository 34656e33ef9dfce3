"""The schedule of the drop fraction: the two that are there, one's own, and what is refused."""

from __future__ import annotations

import copy
import io
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sparseopt_kernels.topology.drop_schedules import constant, cosine
from sparseopt_kernels.topology.rigl import RigL
from sparseopt_kernels.topology.set import SET

BOTH = pytest.mark.parametrize("cls", [SET, RigL])


def make(cls: type[SET | RigL] = RigL, **options: Any) -> SET | RigL:
    """1000 active weights of rising magnitude, and 1000 masked ones that have all the gradient."""
    mask = torch.arange(2000) < 1000
    parameter = nn.Parameter(torch.arange(1.0, 2001.0) * mask)
    parameter.grad = (~mask).float()
    return cls({parameter: mask}, **{"drop_fraction": 0.4, "update_every": 2, "stop_at": 10.5, **options})


def state_of(dst: SET | RigL) -> dict[str, Any]:
    """All that a step may write."""
    ((parameter, mask),) = dst.masks.items()
    return {**copy.deepcopy(dst.state_dict()), "parameter": parameter.tolist(), "mask": mask.tolist()}


def is_unchanged(dst: SET | RigL, before: dict[str, Any]) -> bool:
    after = state_of(dst)
    explored = zip(before.pop("explored"), after.pop("explored"), strict=True)
    return all(torch.equal(*pair) for pair in explored) and before == after


def dropped_by_step(dst: SET | RigL) -> int:
    """How many of the 1000 smallest active weights RigL drops now: the masked ones have the gradient."""
    ((parameter, mask),) = dst.masks.items()
    with torch.no_grad():
        parameter.copy_(torch.arange(1.0, 2001.0) * mask)
    parameter.grad = (~mask).float()
    before = mask.clone()
    dst.step()
    return int((before & ~mask).sum())


class TestSchedules:
    def test_cosine(self) -> None:
        assert cosine(0, 100) == 1.0
        assert cosine(25, 100) == pytest.approx(0.5 * (1 + math.sqrt(0.5)))
        assert cosine(50, 100) == pytest.approx(0.5)
        assert cosine(100, 100) == 0.0
        assert cosine(10**9, math.inf) == 1.0

    def test_constant(self) -> None:
        assert {constant(step, stop_at) for step in (1, 50, 10**9) for stop_at in (0.5, 100, math.inf)} == {
            1.0
        }


class TestChoice:
    def test_the_cosine_is_the_default(self) -> None:
        dropped = [dropped_by_step(dst) for dst in [make()] for _ in range(8)]
        assert dropped == [
            0 if step % 2 else int(400 * 0.5 * (1 + math.cos(math.pi * step / 10.5))) for step in range(1, 9)
        ]

    def test_constant_drops_the_same_until_the_end(self) -> None:
        dst = make(drop_schedule=constant)
        assert [dropped_by_step(dst) for _ in range(14)] == [0, 400] * 5 + [0] * 4

    def test_one_of_the_user(self) -> None:
        dst = make(drop_schedule=lambda step, stop_at: 1 - step / stop_at, stop_at=16)
        assert [dropped_by_step(dst) for _ in range(8)] == [0, 350, 0, 300, 0, 250, 0, 200]

    @BOTH
    def test_it_is_asked_once_per_update(self, cls: type[SET | RigL]) -> None:
        asked = []

        def schedule(step: int, stop_at: float) -> float:
            asked.append((step, stop_at))
            return 0.5

        ((parameter, mask),) = make(cls).masks.items()
        gradient = parameter.grad
        assert gradient is not None
        other = nn.Parameter(parameter.detach().clone())
        other.grad = gradient.clone()
        dst = cls({parameter: mask, other: mask.clone()}, 0.4, 3, stop_at=10.5, drop_schedule=schedule)
        for step in range(1, 15):
            gradient[0] = math.nan if step == 6 else 0.0
            dst.step()
        # Step 6 is postponed to 7; 12 is past the end.
        assert asked == [(3, 10.5), (7, 10.5), (9, 10.5)]
        assert [(type(step), type(stop_at)) for step, stop_at in asked] == [(int, float)] * 3

    @BOTH
    def test_without_an_end(self, cls: type[SET | RigL]) -> None:
        asked = []

        def schedule(step: int, stop_at: float) -> float:
            asked.append(stop_at)
            return 0.0

        dst = make(cls, stop_at=math.inf, drop_schedule=schedule)
        dst.step()
        dst.step()
        assert asked == [math.inf]

    @pytest.mark.parametrize("one", [1, True, np.float32(1.0), np.float64(1.0)], ids=repr)
    def test_any_real_number_will_do(self, one: Any) -> None:
        dst = make(drop_schedule=lambda step, stop_at: one)
        assert [dropped_by_step(dst) for _ in range(2)] == [0, 400]

    @BOTH
    def test_zero_changes_nothing(self, cls: type[SET | RigL]) -> None:
        dst = make(cls, drop_schedule=lambda step, stop_at: 0.0)
        ((_, mask),) = dst.masks.items()
        before = mask.clone()
        for _ in range(4):
            dst.step()
            assert not dst.updated
        assert torch.equal(mask, before)


class TestState:
    @BOTH
    def test_it_is_not_in_the_state(self, cls: type[SET | RigL]) -> None:
        # A local function could not be pickled at all.
        file = io.BytesIO()
        torch.save(make(cls, drop_schedule=lambda step, stop_at: 1.0).state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        assert state.keys() == make(cls).state_dict().keys()
        assert not any("schedule" in key for key in state)

    @BOTH
    def test_a_resumed_run_keeps_the_one_it_was_given(self, cls: type[SET | RigL]) -> None:
        dst = make(cls, drop_schedule=constant)
        dst.load_state_dict(make(cls).state_dict())
        assert dst.drop_schedule is constant


@BOTH
class TestBadInput:
    @pytest.mark.parametrize("bad", ["cosine", 0.5, None])
    def test_what_cannot_be_called(self, cls: type[SET | RigL], bad: Any) -> None:
        with pytest.raises(
            TypeError, match=rf"drop_schedule is {bad!r}, it must be a function of \(step, st"
        ):
            make(cls, drop_schedule=bad)

    @pytest.mark.parametrize(
        "bad", [-0.1, 1.0000001, math.nan, math.inf, -math.inf, None, "0.5", np.float32(2.0)], ids=repr
    )
    def test_what_is_no_factor(self, cls: type[SET | RigL], bad: Any) -> None:
        dst = make(cls, drop_schedule=lambda step, stop_at: bad if step == 4 else 0.5)
        for _ in range(3):
            dst.step()
        before = state_of(dst)
        message = re.escape(f"drop_schedule returned {bad!r} at step 4, it must be a number in [0, 1]")
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                dst.step()
        assert not dst.updated
        assert is_unchanged(dst, before)
        dst.drop_schedule = constant
        dst.step()
        assert dst.updated
        assert dst.state_dict()["step"] == 4
