"""A step under torch.compile: left out of the graph, at one break of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends import Backend
from side_by_side import same_bits
from torch import Tensor, nn

from sparseopt_kernels.optimizer import SparseOpt
from sparseopt_kernels.topology.rigl import RigL
from sparseopt_kernels.topology.set import SET
from sparseopt_kernels.topology.sparsify import sparsify

testing = pytest.importorskip("torch._dynamo.testing")

pytestmark = pytest.mark.slow


def network(backend: Backend) -> tuple[nn.Sequential, SparseOpt]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    masks = sparsify(model, 0.5)
    optimizer = SparseOpt(model.parameters(), lr=0.1, momentum=0.9, masks=masks, backend=backend.name)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    return model, optimizer


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def breaks() -> list[str]:
    return list(torch._dynamo.utils.counters["graph_break"])


def test_a_step_makes_no_graph(backend: Backend) -> None:
    model, optimizer = network(backend)
    same_model, same_optimizer = network(backend)
    graphs = testing.CompileCounter()
    step = torch.compile(optimizer.step, backend=graphs)
    for _ in range(3):
        step()
        same_optimizer.step()
    assert graphs.frame_count == 0
    assert len(breaks()) == 1
    for p, q in zip(model.parameters(), same_model.parameters(), strict=True):
        assert same_bits(p, q)


def test_what_is_around_a_step_is_two_graphs(backend: Backend) -> None:
    model, optimizer = network(backend)

    def train(x: Tensor) -> Tensor:
        y = model(x).sum()
        optimizer.step()
        return y * 2

    graphs = testing.CompileCounter()
    compiled = torch.compile(train, backend=graphs)
    for _ in range(2):
        compiled(torch.ones(2, 8))
    assert graphs.frame_count == 2
    assert len(breaks()) == 1


@pytest.mark.parametrize("cls", [SET, RigL])
def test_an_update_of_the_masks_makes_no_graph(cls: Any) -> None:
    model, optimizer = network(Backend("reference"))
    dst = cls(optimizer._masks, update_every=1, stop_at=9, skip_step=False)

    def train(x: Tensor) -> Tensor:
        y = model(x).sum()
        dst.step()
        optimizer.step()
        return y * 2

    graphs = testing.CompileCounter()
    compiled = torch.compile(train, backend=graphs)
    for _ in range(4):
        compiled(torch.ones(2, 8))
        assert dst.updated in (True, False)
    assert graphs.frame_count == 2
    assert len(breaks()) == 2
    assert dst.state_dict()["step"] == 4
