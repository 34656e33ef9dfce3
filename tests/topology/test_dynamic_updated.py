"""What SET and RigL tell of their last step: ``updated``, and nothing returned."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from sparseopt_kernels.topology.rigl import RigL
from sparseopt_kernels.topology.set import SET

BOTH = pytest.mark.parametrize("cls", [SET, RigL])


def make(cls: type[SET | RigL], **options: Any) -> SET | RigL:
    """400 weights, half of them active; every second step drops all of these, or as many as said."""
    torch.manual_seed(0)
    mask = torch.arange(400) < 200
    parameter = nn.Parameter(torch.randn(400) * mask)
    parameter.grad = torch.randn(400)
    return cls({parameter: mask}, **{"drop_fraction": 1.0, "update_every": 2, "stop_at": math.inf, **options})


@BOTH
def test_step_returns_nothing_whether_masks_change_or_not(cls: type[SET | RigL]) -> None:
    # ``if pruner(): optimizer.step()`` of other libraries means the opposite of "the topology changed".
    dst = make(cls)
    assert [dst.step() for _ in range(4)] == [None] * 4  # type: ignore[func-returns-value]


@BOTH
def test_it_is_about_the_last_step_alone(cls: type[SET | RigL]) -> None:
    dst = make(cls)
    (parameter,) = dst.masks
    seen = [dst.updated]
    for _ in range(4):
        parameter.grad = torch.randn(400)
        dst.step()
        seen.append(dst.updated)
    assert seen == [False, False, True, False, True]


@BOTH
@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_one_changed_layer_is_enough(cls: type[SET | RigL], first: bool) -> None:
    full = nn.Parameter(torch.ones(4))
    full.grad = torch.ones(4)
    masks = [*make(cls).masks.items(), (full, torch.ones(4, dtype=torch.bool))]
    dst = cls(dict(masks if first else masks[::-1]), drop_fraction=1.0, update_every=1, stop_at=math.inf)
    dst.step()
    assert dst.updated


@BOTH
def test_it_is_not_to_be_written(cls: type[SET | RigL]) -> None:
    with pytest.raises(AttributeError):
        make(cls).updated = True  # type: ignore[misc]


@BOTH
def test_a_resumed_run_has_not_made_a_step(cls: type[SET | RigL]) -> None:
    dst = make(cls)
    dst.step()
    dst.step()
    state = dst.state_dict()
    assert dst.updated
    dst.load_state_dict(state)
    assert not dst.updated
    assert not any("updated" in key for key in state)


def test_a_refused_step_has_changed_nothing() -> None:
    dst = make(RigL, update_every=1)
    dst.step()
    assert dst.updated
    (parameter,) = dst.masks
    parameter.grad = None
    with pytest.raises(RuntimeError, match="no masked parameter has one"):
        dst.step()
    assert not dst.updated


@BOTH
def test_a_copy_remembers(cls: type[SET | RigL]) -> None:
    dst = make(cls)
    dst.step()
    dst.step()
    assert copy.deepcopy(dst).updated
