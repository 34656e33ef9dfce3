"""Masks of a model, while a copy of it is trained."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import sparseopt_kernels as sk


def steps(method: Any, count: int, *, trains: str = "a copy", late: bool = False) -> list[str]:
    """What a method says that was made for a model, with an update in every second step.

    Args:
        trains: which model is trained.
        late: whether the method is stepped after the gradients were zeroed.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 5))
    masks = sk.sparsify(model, 0.5)
    dst = method(masks)
    trained = copy.deepcopy(model) if trains == "a copy" else model
    opt = sk.SparseOpt(trained.parameters(), 0.01, masks=sk.Masks(trained))
    if trains == "its norms":
        for p in masks:
            p.requires_grad_(False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(count):
            opt.zero_grad()
            trained(torch.randn(16, 20)).square().mean().backward()
            if not late:
                dst.step()
            opt.step()
            if late:
                opt.zero_grad()
                dst.step()
    return [str(w.message) for w in caught]


METHODS = {
    "SET": lambda masks: sk.SET(masks, update_every=2, stop_at=100, skip_step=False),
    "GMP": lambda masks: sk.GMP(masks, 0.9, update_every=2, stop_at=50),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_third_update_warns(name: str) -> None:
    assert steps(METHODS[name], 5) == []
    assert len(steps(METHODS[name], 6)) == 1
    (said,) = steps(METHODS[name], 20)
    first = f"between updates of {name}, nothing changes the weights of '0.weight' (and of 1 more), and each"
    assert said.startswith(first)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("trains", ["the model", "its norms"])
def test_the_model_itself_is_fine(name: str, trains: str, late: bool) -> None:
    assert steps(METHODS[name], 20, trains=trains, late=late) == []


def test_of_rigl_it_is_an_error() -> None:
    with pytest.raises(
        RuntimeError, match="the masks are of another model, such as the one that this is a copy"
    ):
        steps(lambda masks: sk.RigL(masks, update_every=2, stop_at=100), 2)
