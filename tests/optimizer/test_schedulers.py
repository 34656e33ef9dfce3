"""Learning rate schedulers and learning rates in tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import Backend
from network import Network, assert_same, run
from torch import Tensor
from torch.nn.parameter import Parameter
from torch.optim import SGD, lr_scheduler
from torch.optim.swa_utils import SWALR

from sparseopt_kernels.masks.mapping import Masks
from sparseopt_kernels.optimizer import SparseOpt

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5], 0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 8, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.3, 3, base_momentum=0.5, max_momentum=0.95),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.3, total_steps=12, cycle_momentum=True),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 3), lr_scheduler.CosineAnnealingLR(o, 8)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: SWALR(o, 0.02, 5),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
}


@pytest.mark.same_bits_as_sgd
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float-lr", "tensor-lr"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers(backend: Backend, scheduler: str, tensor_lr: bool) -> None:
    """Learning rates, momenta and weights are those of torch.optim.SGD under the same scheduler."""
    models = [Network(), Network()]
    rates: list[list[tuple[float, float]]] = []
    for model in models:
        rates.append([])
        lr = torch.tensor(0.1, dtype=torch.float64) if tensor_lr else 0.1
        optimizer: torch.optim.Optimizer
        if model is models[0]:
            optimizer = SGD(model.parameters(), lr=lr, momentum=0.9, foreach=False)
        else:
            optimizer = SparseOpt(model.parameters(), lr=lr, momentum=0.9, backend=backend.name)
        schedule = SCHEDULERS[scheduler](optimizer)
        for step in range(12):
            model.set_grads(step)
            optimizer.step()
            plateau = isinstance(schedule, lr_scheduler.ReduceLROnPlateau)
            schedule.step(1.0) if plateau else schedule.step()
            group = optimizer.param_groups[0]
            rates[-1].append((float(group["lr"]), group["momentum"]))
    assert rates[0] == rates[1]
    assert len(set(rates[1])) > 1
    assert_same(*models)


def test_scheduler_does_not_warn_of_the_order(backend: Backend, recwarn: pytest.WarningsRecorder) -> None:
    model = Network()
    optimizer = SparseOpt(model.parameters(), lr=0.1, backend=backend.name)
    schedule = lr_scheduler.StepLR(optimizer, 1)
    run(model, optimizer, range(1))
    schedule.step()
    assert not recwarn.list


def test_tensor_lr_is_shared_with_the_caller(backend: Backend) -> None:
    """What the caller writes into the tensor, the next step uses; the step never writes into it."""
    p = Parameter(torch.zeros(2, 3))
    lr = torch.tensor(0.5)
    optimizer = SparseOpt([p], lr=lr, masks={p: torch.ones(2, 3, dtype=torch.bool)}, backend=backend.name)
    assert optimizer.param_groups[0]["lr"] is lr
    p.grad = -torch.ones(2, 3)
    optimizer.step()
    lr.fill_(0.25)
    optimizer.step()
    assert p.unique().tolist() == [0.75]
    assert lr.item() == 0.25
    assert optimizer.param_groups[0]["lr"] is lr


@pytest.mark.parametrize("lr", [torch.tensor(0.5), torch.tensor([0.5]), torch.tensor(0.5).double()])
def test_tensor_lr_of_one_element(backend: Backend, lr: Tensor) -> None:
    p = Parameter(torch.zeros(3))
    p.grad = -torch.ones(3)
    SparseOpt([p], lr=lr, backend=backend.name).step()
    assert p.tolist() == [0.5, 0.5, 0.5]


def test_lr_zero_moves_the_momentum_only(backend: Backend) -> None:
    """As with SGD: a step at lr = 0 collects momentum, which the next step uses."""
    model = Network()
    optimizer = SparseOpt(model.parameters(), lr=0.0, momentum=0.5, masks=Masks(model), backend=backend.name)
    before = copy.deepcopy(model)
    run(model, optimizer, range(2))
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q)
    assert all(optimizer.state[p]["momentum_buffer"].any() for p in model.parameters())
