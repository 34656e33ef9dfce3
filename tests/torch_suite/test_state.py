"""PyTorch's generic checks of an optimizer: its state and checkpoints."""

from __future__ import annotations

import copy
import functools
import io
from typing import Any

import torch
from torch.nn.parameter import Parameter
from torch_optimizer_info import closure_loss, each_input, each_masking, keyword_arguments


@each_masking
def test_load_state_dict_deep_copies(make: Any) -> None:
    """Two optimizers never share a buffer, and the saved state does not move with the run."""
    p = Parameter(torch.randn(4, 5))
    optimizer = make([p], lr=0.1, momentum=0.9)
    p.grad = torch.randn(4, 5)
    optimizer.step()
    saved = optimizer.state_dict()
    other = make([p], lr=0.1, momentum=0.9)
    other.load_state_dict(copy.deepcopy(saved))
    for mine, theirs in zip(optimizer.state.values(), other.state.values(), strict=True):
        for key, value in mine.items():
            assert value.data_ptr() != theirs[key].data_ptr()


@each_masking
@each_input
def test_save_load_equality_with_weights_only(make: Any, given: Any) -> None:
    """A checkpoint needs no pickled code, and what is loaded is what was saved."""
    weight, bias = Parameter(torch.randn(2, 3)), Parameter(torch.randn(2))
    optimizer = make([weight, bias], **keyword_arguments(given))
    x = torch.randn(3)
    optimizer.step(functools.partial(closure_loss, optimizer, weight, bias, x))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    torch.testing.assert_close(optimizer.state_dict()["state"], loaded["state"], rtol=0, atol=0)
    assert optimizer.state_dict()["param_groups"] == loaded["param_groups"]


@each_masking
@each_input
def test_state_dict_deterministic(make: Any, given: Any) -> None:
    """One run, and one that is saved and loaded after each step, end in the same bits."""
    generator = torch.Generator().manual_seed(0)
    value, x = torch.randn(2, 3, generator=generator), torch.randn(3, generator=generator)
    runs = []
    for reload in (False, True):
        weight, bias = Parameter(value.clone()), Parameter(torch.zeros(2))
        optimizer = make([weight, bias], **keyword_arguments(given))
        for _ in range(6):
            optimizer.step(functools.partial(closure_loss, optimizer, weight, bias, x))
            if reload:
                state = optimizer.state_dict()
                optimizer = make([weight, bias], **keyword_arguments(given))
                optimizer.load_state_dict(state)
        runs.append((weight, bias))
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


@each_masking
def test_load_state_dict_with_and_without_names(make: Any) -> None:
    """Names are kept where they are saved, and not needed where they are not."""
    p = Parameter(torch.randn(4, 5))
    p.grad = torch.randn(4, 5)
    named = make([("w", p)], lr=0.1, momentum=0.9)
    unnamed = make([p], lr=0.1, momentum=0.9)
    for optimizer in (named, unnamed):
        optimizer.step()
    states = named.state_dict(), unnamed.state_dict()
    unnamed.load_state_dict(states[0])
    named.load_state_dict(states[1])
    assert named.param_groups[0]["param_names"] == ["w"]
    for optimizer in (named, unnamed):
        optimizer.step()
