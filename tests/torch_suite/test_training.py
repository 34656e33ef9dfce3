"""PyTorch's generic checks of an optimizer: that it trains."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from typing import Any

import pytest
import torch
from backends import INTERPRETED, Backend
from torch import nn
from torch.nn.parameter import Parameter
from torch_optimizer_info import INFO, closure_loss, each_input, each_masking, keyword_arguments

from sparseopt_kernels.optimizer import SparseOpt

SCHEDULERS = [[], *INFO.scheduler_inputs]
if INTERPRETED:  # the host does what schedulers do
    SCHEDULERS = SCHEDULERS[:2]


@pytest.mark.parametrize("layout", ["contiguous", "non-contiguous"])
@each_masking
@each_input
def test_goes_right_direction(make: Any, given: Any, layout: str) -> None:
    """Down, or up where asked to, alone and under each set of schedulers."""
    gap = 1 if layout == "contiguous" else 2
    for schedulers in SCHEDULERS:
        generator = torch.Generator().manual_seed(3)
        weight = Parameter(torch.randn(10, 5, gap, generator=generator)[..., 0])
        bias = Parameter(torch.randn(10, gap, generator=generator)[..., 0])
        x = torch.randn(5, generator=generator)
        optimizer = make([weight, bias], **keyword_arguments(given))
        chosen = [scheduler(optimizer) for scheduler in schedulers]
        losses = []
        for _ in range(20):
            loss = optimizer.step(functools.partial(closure_loss, optimizer, weight, bias, x)).item()
            losses.append(loss)
            for scheduler in chosen:
                plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                scheduler.step(loss) if plateau else scheduler.step()
        if given.kwargs.get("maximize"):
            assert losses[-1] > losses[0]
        else:
            assert losses[-1] < losses[0]


@pytest.mark.parametrize("masked", [False], ids=["dense"])
def test_rosenbrock(make: Any) -> None:
    """A hard valley, one coordinate of the gradient at a time: float32 follows float64 all the way."""
    steps = []
    for narrow in (False, True):
        p = Parameter(torch.tensor([1.5, 1.5], dtype=torch.float32 if narrow else torch.float64))
        optimizer = make([p], lr=1e-4, momentum=0.9)
        for t in range(200):
            optimizer.zero_grad()
            x, y = p.detach().unbind()
            gradient = torch.stack([-400 * x * (y - x**2) - 2 * (1 - x), 200 * (y - x**2)])
            keep = torch.tensor([1.0, 0.0] if t % 2 else [0.0, 1.0])
            p.grad = (gradient * keep).to(p.dtype)
            optimizer.step()
        steps.append(p.detach().double())
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-4, atol=1e-4)
    assert (steps[0] - 1).norm() < math.sqrt(0.5)


@each_masking
@pytest.mark.parametrize("key", ["lr", "weight_decay"])
def test_param_groups_with_their_own(make: Any, key: str) -> None:
    """What a group has set, it does; what it has not, it takes from the constructor."""
    for values in itertools.permutations([0.0, 1e-2]):
        weight, bias = Parameter(torch.randn(10, 5)), Parameter(torch.randn(10))
        groups = [{"params": [weight], key: values[0]}, {"params": [bias]}]
        optimizer = make(groups, **{"lr": 1e-2, key: values[1]})
        assert [g[key] for g in optimizer.param_groups] == list(values)
        x = torch.randn(5)
        losses = [closure_loss(optimizer, weight, bias, x).item()]
        for _ in range(20):
            optimizer.step()
            losses.append(closure_loss(optimizer, weight, bias, x).item())
        assert losses[-1] < losses[0]


@each_masking
@each_input
def test_tensor_lr_equals_float_lr(make: Any, given: Any) -> None:
    models = []
    for lr in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        generator = torch.Generator().manual_seed(0)
        weight = Parameter(torch.randn(10, 5, generator=generator))
        bias = Parameter(torch.randn(10, generator=generator))
        optimizer = make([weight, bias], **keyword_arguments(given) | {"lr": lr})
        x = torch.randn(5, generator=generator)
        for _ in range(3):
            optimizer.step(functools.partial(closure_loss, optimizer, weight, bias, x))
        models.append((weight, bias))
    for a, b in zip(*models, strict=True):
        assert torch.equal(a, b)


@each_masking
@each_input
def test_complex_is_two_real_numbers(make: Any, given: Any) -> None:
    """A complex parameter moves as its real view does. A mask of the view has each element twice: the
    ratios of fan-in are the same."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(10, 5, 2, generator=generator)
    as_complex, as_real = Parameter(torch.view_as_complex(value.clone())), Parameter(value.clone())
    one, other = make([as_complex], **keyword_arguments(given)), make([as_real], **keyword_arguments(given))
    for mask in one._masks.values():
        other._masks[as_real] = mask.unsqueeze(-1).expand(10, 5, 2)
    for _ in range(3):
        grad = torch.randn(10, 5, 2, generator=generator)
        as_complex.grad, as_real.grad = torch.view_as_complex(grad.clone()), grad.clone()
        one.step()
        other.step()
    torch.testing.assert_close(torch.view_as_real(as_complex), as_real)


@each_masking
def test_step_is_noop_when_params_have_no_grad(make: Any) -> None:
    params = [Parameter(torch.randn(2, 3)) for _ in range(2)]
    optimizer = make(params, momentum=0.9, weight_decay=0.1, max_grad_norm=1.0)
    before = copy.deepcopy(params)
    optimizer.step()
    for p, q in zip(params, before, strict=True):
        assert torch.equal(p, q)


@each_input
@pytest.mark.parametrize("masked", [False], ids=["dense"])
def test_step_is_noop_for_zero_grads(make: Any, given: Any) -> None:
    """Without weight decay and HAM's beta, a gradient of 0 moves nothing."""
    if given.kwargs.get("weight_decay") or given.kwargs.get("ham_beta"):
        pytest.skip("decays without a gradient, as it should")
    p = Parameter(torch.randn(5, 2))
    before = p.detach().clone()
    optimizer = make([p], **keyword_arguments(given))
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(p, before)


@each_masking
@each_input
def test_grad_scaling_with_autocast_goes_right_direction(make: Any, given: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = Parameter(torch.randn(10, 5, generator=generator))
    bias = Parameter(torch.randn(10, generator=generator))
    x = torch.randn(5, generator=generator)
    optimizer = make([weight, bias], **keyword_arguments(given))
    before = (weight.mv(x) + bias).pow(2).sum().item()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = (weight.mv(x) + bias).pow(2).sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    after = (weight.mv(x) + bias).pow(2).sum().item()
    assert after > before if given.kwargs.get("maximize") else after < before


@each_masking
@each_input
def test_mixed_dtypes(make: Any, given: Any) -> None:
    """Parameters of every dtype in one optimizer, each updated as it is alone (the norm limit apart)."""
    if "max_grad_norm" in given.kwargs:
        pytest.skip("the norm is one over all parameters")
    generator = torch.Generator().manual_seed(0)
    kinds = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
    values = [torch.randn(3, 4, generator=generator).to(kind) for kind in kinds]
    grads = [torch.randn(3, 4, generator=generator).to(kind) for kind in kinds]
    together = [Parameter(value.clone()) for value in values]
    alone = [Parameter(value.clone()) for value in values]
    optimizers = [make(together, **keyword_arguments(given))]
    optimizers.extend(make([p], **keyword_arguments(given)) for p in alone)
    for params in (together, alone):
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.clone()
    for optimizer in optimizers * 2:
        optimizer.step()
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a, b)


def test_lazily_made_layers_train(backend: Backend) -> None:
    """A model built on the meta device and given memory later, as large models are."""
    with torch.device("meta"):
        model = nn.Linear(5, 3)
    model = model.to_empty(device="cpu")
    model.reset_parameters()
    optimizer = SparseOpt(model.parameters(), lr=0.1, backend=backend.name)
    model(torch.randn(2, 5)).sum().backward()
    before = model.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.weight, before)
