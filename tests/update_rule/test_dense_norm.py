"""``max_grad_norm_over="dense"``: the norm counts masked positions too, with the c_i of their row."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from backends import Backend
from oracle import Hyper
from rules import DTYPES
from side_by_side import PATTERNS, SideBySide, Spec
from torch import Tensor
from torch.nn.parameter import Parameter

from sparseopt_kernels.optimizer import SparseOpt

RULE = Hyper(lr=0.05, momentum=0.9, weight_decay=0.01, max_grad_norm=2.0)


@pytest.mark.parametrize(("correction", "factors"), [("layer", (0.0, 2.0)), ("none", (1.0, 1.0))])
def test_by_hand(backend: Backend, correction: Any, factors: tuple[float, float]) -> None:
    """Fan-in 0 and 2, c = 0 and sqrt(2): a row without inputs counts where nothing is corrected."""
    mask = torch.tensor([[False, False, False], [True, True, False]])
    p, bias = Parameter(torch.zeros(2, 3)), Parameter(torch.zeros(1))
    p.grad, bias.grad = torch.tensor([[1.0, 2, 2], [1, 1, 4]]), torch.tensor([3.0])
    squares = 9 * factors[0] + 18 * factors[1] + 9
    SparseOpt(
        [p, bias],
        lr=1.0,
        masks={p: mask},
        correction=correction,
        max_grad_norm=2.0,
        max_grad_norm_over="dense",
        backend=backend.name,
    ).step()
    scale = 2.0 / math.sqrt(squares)
    moved = math.sqrt(factors[1]) * scale
    torch.testing.assert_close(p.detach(), torch.tensor([[0.0, 0, 0], [-moved, -moved, 0]]))
    torch.testing.assert_close(bias.detach(), torch.tensor([-3.0 * scale]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_against_the_oracle(backend: Backend, pattern: str, dtype: torch.dtype) -> None:
    specs = [Spec((5, 131), pattern, dtype), Spec((2, 3, 3, 3), pattern, dtype), Spec((7,), None, dtype)]
    # Of GPU backends, PyTorch computes this norm: their kernels are handed the coefficient.
    for correction in ("layer",) if backend.is_slow else ("layer", "unnormalized", "none"):
        rules = [Hyper(**{**RULE.__dict__, "correction": correction})]
        SideBySide(backend, specs, rules, norm_over="dense").run()


@pytest.mark.parametrize("groups", [1, 3])
def test_conv_transpose(backend: Backend, groups: int) -> None:
    specs = [
        Spec((2 * groups, 5, 3, 2), "ramp", dtype, transposed_groups=groups)
        for dtype in (torch.float32, torch.float64)
    ]
    SideBySide(backend, specs, [RULE], norm_over="dense").run(grad_scale=4.0)


def test_overflows_and_groups(backend: Backend) -> None:
    specs = [Spec((4, 37), "half", torch.float32), Spec((5, 9), "sparse90"), Spec((5,), None, torch.float32)]
    rules = [RULE, Hyper(lr=0.1, correction="none", max_grad_norm=0.5), Hyper(lr=0.1)]
    run = SideBySide(backend, specs, rules, norm_over="dense")
    for found_inf in [1.0, 0.0, 0.0, 2.0, 0.0]:
        run.step(run.random_grads(1024.0), grad_scale=1024.0, found_inf=found_inf)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,), ()], ids=str)
def test_empty_tensors(backend: Backend, shape: tuple[int, ...]) -> None:
    SideBySide(
        backend, [Spec(shape, "half"), Spec(shape, None), Spec((3, 4))], [RULE], norm_over="dense"
    ).run()


def test_memory_formats(backend: Backend) -> None:
    """A channels_last weight with a gradient of either format, one of a view with gaps, and a complex one."""
    norms = []
    for layout in ("contiguous", "channels_last", "mixed"):
        torch.manual_seed(0)
        value, grad, mask = torch.zeros(4, 3, 2, 2), torch.randn(4, 3, 2, 2), torch.rand(4, 3, 2, 2) < 0.3
        last = torch.channels_last
        p = Parameter(value if layout == "contiguous" else value.to(memory_format=last))
        p.grad = grad.to(memory_format=last) if layout == "channels_last" else grad
        gaps = Parameter(torch.zeros(4, 12)[:, ::2])
        gaps.grad = torch.ones(4, 6)
        other = Parameter(torch.zeros(2, 2, dtype=torch.complex64))
        other.grad = torch.full((2, 2), 3 + 4j)
        masks = {p: mask, gaps: torch.eye(4, 6) != 0, other: torch.eye(2) != 0}
        options: dict[str, Any] = {"correction": "none", "max_grad_norm": 1.0, "max_grad_norm_over": "dense"}
        SparseOpt([*masks], lr=1.0, masks=masks, backend=backend.name, **options).step()
        norm = math.sqrt(float(grad.square().sum()) + 24 + 4 * 25)
        torch.testing.assert_close(p.detach(), -grad * mask / norm)
        torch.testing.assert_close(other.detach(), -torch.eye(2) * (3 + 4j) / norm)
        norms.append(norm)
    assert len(set(norms)) == 1


def step(**options: Any) -> Tensor:
    p = Parameter(torch.zeros(1, 2))
    p.grad = torch.tensor([[3.0, 4.0]])
    masks = {p: torch.tensor([[True, False]])}
    SparseOpt([p], lr=1.0, masks=masks, correction="none", max_grad_norm=1.0, **options).step()
    return p.detach()


def test_active_is_the_default() -> None:
    assert step().tolist() == step(max_grad_norm_over="active").tolist() == [[-1.0, 0.0]]
    torch.testing.assert_close(step(max_grad_norm_over="dense"), torch.tensor([[-0.6, 0.0]]))


def test_a_copy_has_it() -> None:
    p = Parameter(torch.zeros(1, 2))
    options: dict[str, Any] = {"correction": "none", "max_grad_norm": 1.0, "max_grad_norm_over": "dense"}
    copied = copy.deepcopy(SparseOpt([p], lr=1.0, masks={p: torch.tensor([[True, False]])}, **options))
    own = copied.param_groups[0]["params"][0]
    own.grad = torch.tensor([[3.0, 4.0]])
    copied.step()
    torch.testing.assert_close(own.detach(), torch.tensor([[-0.6, 0.0]]))


def test_bad_values() -> None:
    p = Parameter(torch.zeros(1))
    with pytest.raises(
        ValueError, match=r"max_grad_norm_over is 'all', it must be one of \('active', 'dense'\)"
    ):
        SparseOpt([p], max_grad_norm_over="all", masks={})  # type: ignore[arg-type]
    other = Parameter(torch.ones(2))
    groups: list[dict[str, Any]] = [{"params": [p], "max_grad_norm_over": "dense"}, {"params": [other]}]
    with pytest.raises(ValueError, match="max_grad_norm_over is 'active' and 'dense' in different parameter"):
        SparseOpt([dict(group) for group in groups], masks={}, max_grad_norm=1.0)
    optimizer = SparseOpt(groups, masks={}, max_grad_norm=1.0, max_grad_norm_over="dense")
    optimizer.param_groups[1]["max_grad_norm_over"] = "active"
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="it must be the same in all of them"):
        optimizer.step()


@pytest.mark.parametrize("limit", [True, "1", torch.tensor([1.0, 2.0])], ids=str)
def test_limits_that_are_none(limit: Any) -> None:
    with pytest.raises(
        ValueError, match=r"max_grad_norm is .*, it must be a number > 0, or None for no limit"
    ):
        SparseOpt([Parameter(torch.ones(2))], masks={}, max_grad_norm=limit)


def test_without_a_limit_it_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="max_grad_norm_over is 'dense', and max_grad_norm is None"):
        SparseOpt([Parameter(torch.ones(2))], masks={}, max_grad_norm_over="dense")


def test_it_may_change_and_is_part_of_checkpoints(backend: Backend) -> None:
    """Written into the group, or loaded, it holds from the next step on."""

    def made() -> tuple[Parameter, SparseOpt]:
        p = Parameter(torch.zeros(1, 2))
        p.grad = torch.tensor([[3.0, 4.0]])
        masks = {p: torch.tensor([[True, False]])}
        options: dict[str, Any] = {"correction": "none", "max_grad_norm": 1.0, "backend": backend.name}
        return p, SparseOpt([p], lr=1.0, masks=masks, **options)

    p, optimizer = made()
    for _ in range(3):
        optimizer.step()
    assert p.tolist() == [[-3.0, 0.0]]
    optimizer.param_groups[0]["max_grad_norm_over"] = "dense"
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([[-3.6, 0.0]]))
    q, other = made()
    other.load_state_dict(optimizer.state_dict())
    other.step()
    torch.testing.assert_close(q.detach(), torch.tensor([[-0.6, 0.0]]))
