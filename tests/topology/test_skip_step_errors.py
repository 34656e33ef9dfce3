"""The step that follows an update of the masks raises an error."""

from __future__ import annotations

import pytest
import torch
from topology_training import Training


def test_a_step_that_fails_is_left_out_when_it_is_made() -> None:
    training = Training()
    training.to_update()
    gradient = training.model.get_parameter("0.weight").grad
    training.model.get_parameter("0.weight").grad = torch.zeros(16, 12).double().to_sparse()
    with pytest.raises(ValueError, match="layout"):
        training.opt.step()
    training.model.get_parameter("0.weight").grad = gradient
    assert not training.steps(training.opt.step)


@pytest.mark.parametrize("then", ["step", "load"])
def test_an_error_that_is_kept_costs_no_second_step(then: str) -> None:
    """Its traceback keeps the step that was to be left out."""
    training = Training()
    state = training.dst.state_dict()
    training.to_update()
    first = training.model.get_parameter("0.weight")
    gradient, first.grad = first.grad, torch.zeros(16, 12).double().to_sparse()
    with pytest.raises(ValueError, match="layout") as kept:
        training.opt.step()
    first.grad = gradient
    if then == "load":
        training.dst.load_state_dict(state)
    else:
        training.backward()
        training.dst.step()
    assert training.steps(training.opt.step)
    assert kept.traceback
