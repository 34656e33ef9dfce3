"""Settings of sparse training methods that are wrong: given, loaded, or written into the object."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from sparseopt_kernels.topology.dynamic_sparse_training import DynamicSparseTraining
from sparseopt_kernels.topology.gmp import GMP
from sparseopt_kernels.topology.rigl import RigL
from sparseopt_kernels.topology.set import SET

WRONG = [
    ("update_every", "4", "update_every is '4', it must be an integer of at least 1"),
    ("update_every", None, "update_every is None, it must be an integer of at least 1"),
    ("update_every", math.inf, "update_every is inf, it must be an integer of at least 1"),
    ("update_every", True, "update_every is True, it must be an integer of at least 1"),
    ("stop_at", "12", "stop_at is '12', it must be positive"),
    ("stop_at", None, "stop_at is None, it must be positive"),
    ("drop_fraction", "a", r"drop_fraction is 'a', it must be in \[0, 1\]"),
    ("drop_fraction", 7, r"drop_fraction is 7, it must be in \[0, 1\]"),
    ("min_fan_in", -1, "min_fan_in is -1, it must be an integer of at least 0"),
    ("skip_step", "no", "skip_step is 'no', it must be True or False"),
    ("seed", "a", "seed is 'a', it must be an integer"),
]


def masks() -> dict[Parameter, Tensor]:
    weight = Parameter(torch.arange(12.0).view(3, 4))
    weight.grad = torch.arange(12.0).flip(0).view(3, 4)
    return {weight: torch.tensor([[True, True, False, False]] * 3)}


def method(**settings: Any) -> SET:
    given: dict[str, Any] = {"update_every": 2, "stop_at": 100, "skip_step": False}
    return SET(masks(), **{**given, **settings})


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_given(name: str, value: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        method(**{name: value})


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_loaded(name: str, value: Any, message: str) -> None:
    """Nothing has changed then."""
    dst = method()
    before = dst.state_dict()
    with pytest.raises((TypeError, ValueError), match=message):
        dst.load_state_dict({**before, name: value})
    after = dst.state_dict()
    assert [before.pop("explored")[0].tolist()] == [after.pop("explored")[0].tolist()]
    assert before == after


LOADED: list[tuple[DynamicSparseTraining, dict[str, Any], str]] = [
    (RigL(masks(), stop_at=100), {"regrow": "x"}, "regrow is 'x', it must be 'original' or 'corrected'"),
    (GMP(masks(), 0.8, stop_at=100), {"stop_at": math.inf}, "stop_at is inf, it must be finite and over"),
    (GMP(masks(), 0.8, stop_at=100), {"start_at": 100}, r"stop_at is 100.0, it must be .* over start_at"),
]


@pytest.mark.parametrize(("dst", "settings", "message"), LOADED, ids=["regrow", "endless", "no time"])
def test_loaded_by_one_method(dst: DynamicSparseTraining, settings: dict[str, Any], message: str) -> None:
    state = dst.state_dict()
    with pytest.raises(ValueError, match=message):
        dst.load_state_dict({**state, **settings})
    assert {name: getattr(dst, name) for name in settings} == {name: state[name] for name in settings}


def test_a_step_that_is_none_is_not_loaded() -> None:
    dst = method()
    with pytest.raises(ValueError, match=r"state_dict\['step'\] is -4, it must be an integer of at least 0"):
        dst.load_state_dict({**dst.state_dict(), "step": -4})


def test_integers_of_numpy() -> None:
    dst = method(update_every=np.int64(3), min_fan_in=np.int64(1))
    assert (dst.update_every, dst.min_fan_in) == (3, 1)


@pytest.mark.parametrize("cls", [SET, RigL])
@pytest.mark.parametrize("fraction", [0.0, 0.01], ids=["none", "less than one weight"])
def test_an_update_of_nothing_leaves_no_step_out(cls: type[SET], fraction: float) -> None:
    dst = cls(masks(), fraction, 2, stop_at=100)
    dst.step()
    dst.step()
    assert not dst.updated
    assert not dst.skip_next


def test_the_table_before_the_first_update_has_no_numbers_of_it() -> None:
    dst = method()
    assert str(dst).splitlines()[-1].split()[-5:] == ["-"] * 5
    dst.step()
    dst.step()
    assert "-" not in str(dst).splitlines()[-1].split()
