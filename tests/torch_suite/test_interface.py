"""PyTorch's generic checks of an optimizer: attributes, hooks, flags, errors."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.parameter import Parameter
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch_optimizer_info import INFO, OptimizerErrorEnum, closure_loss, each_masking

from sparseopt_kernels.optimizer import SparseOpt


@each_masking
def test_deepcopy_copies_all_public_attributes(make: Any) -> None:
    optimizer = make([Parameter(torch.randn(2, 3))], lr=0.1, momentum=0.9)

    def public(instance: object) -> set[str]:
        return {name for name in dir(instance) if not name.startswith("_")}

    assert public(optimizer) == public(copy.deepcopy(optimizer))


@each_masking
def test_hooks(make: Any) -> None:
    """Pre hooks run before post hooks, global ones on the outside, each exactly once a step."""
    seen: list[int] = []
    p = Parameter(torch.ones(2, 3))
    optimizer = make([p], lr=0.1, momentum=0.9)

    def record(number: int) -> Any:
        return lambda *_: seen.append(number)

    handles = [
        register_optimizer_step_pre_hook(record(0)),
        optimizer.register_step_pre_hook(record(1)),
        optimizer.register_step_post_hook(record(2)),
        register_optimizer_step_post_hook(record(3)),
    ]
    try:
        p.grad = torch.ones(2, 3)
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    optimizer.step()
    assert seen == [0, 1, 2, 3]


@each_masking
@pytest.mark.parametrize("flag", ["foreach", "fused"])
def test_implementation_flags_change_nothing(make: Any, flag: str) -> None:
    """``foreach`` and ``fused`` choose an implementation in PyTorch; here they change nothing."""
    runs = []
    for value in (None, True, False):
        generator = torch.Generator().manual_seed(0)
        weight = Parameter(torch.randn(10, 5, generator=generator))
        bias = Parameter(torch.randn(10, generator=generator))
        x = torch.randn(5, generator=generator)
        optimizer = make([weight, bias], lr=0.1, momentum=0.9, **{flag: value})
        for _ in range(3):
            optimizer.step(functools.partial(closure_loss, optimizer, weight, bias, x))
        runs.append((weight, bias))
    for run in runs[1:]:
        for a, b in zip(runs[0], run, strict=True):
            assert torch.equal(a, b)


def error_inputs() -> Iterator[Any]:
    yield from INFO.optim_error_inputs_func(device="cpu", dtype=torch.float32)


@pytest.mark.parametrize(
    "case", list(error_inputs()), ids=lambda c: c.optimizer_error_input.desc.replace(" ", "-")
)
def test_errors(case: Any) -> None:
    """What PyTorch refuses, we refuse, with the same kind of error; our messages are our own."""
    given = case.optimizer_error_input
    params = [Parameter(torch.randn(1))] if given.params is None else given.params
    assert case.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
    if issubclass(case.error_type, Warning):
        with pytest.warns(case.error_type):
            SparseOpt(params, **given.kwargs)
        return
    with pytest.raises(case.error_type):
        SparseOpt(params, **given.kwargs)
