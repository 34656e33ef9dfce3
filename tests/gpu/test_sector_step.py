"""The two ways of the GPU backends, of which each checks the other: one pass over the neurons of a mask that
is new, and a step over the sectors of one that stayed. Weights and momentum are the same, bit for bit.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from backends import INTERPRETED, Backend
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sector_lists import check_lists, plan_of
from side_by_side import PATTERNS, pattern_mask, same_bits
from torch import Tensor
from torch.nn.parameter import Parameter

from sparseopt_kernels import SparseOpt
from sparseopt_kernels.kernels.gpu import plan as gpu_plan
from sparseopt_kernels.kernels.gpu import tables as gpu_tables
from sparseopt_kernels.kernels.gpu.lists import LISTED
from sparseopt_kernels.kernels.gpu.tables import SectorRow

COLUMNS: tuple[int, ...]
COLUMNS = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 27, 31, 64, 100, 147, 255, 256, 257, 513, 1000, 2048, 4096, 5000)
if INTERPRETED:
    COLUMNS = (1, 3, 8, 15, 27, 64, 257, 1000)
DTYPES = [torch.float32, torch.float16]
DTYPES += (
    [] if INTERPRETED else [torch.bfloat16, torch.float64]
)  # what the interpreter does not round; the other
RULES: list[dict[str, Any]] = [
    {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    {"lr": 0.1, "momentum": 0.9, "nesterov": True, "correction": "unnormalized", "ham_alpha": 2.0},
    {"lr": 0.3, "correction": "none", "maximize": True},
]


pytestmark = pytest.mark.parametrize(
    "backend",
    ["triton"] if INTERPRETED else [pytest.param("cuda-emulated", marks=pytest.mark.compiled)],
    indirect=True,
)


class Network:
    """Parameters with masks and one without, in groups with rules of their own."""

    def __init__(
        self,
        backend: Backend,
        shapes: list[tuple[int, int]],
        patterns: list[str],
        dtype: torch.dtype,
        seed: int,
    ):
        generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.parameters = [Parameter(torch.randn(s, generator=generator).to(dtype)) for s in [*shapes, (11,)]]
        masked = zip(self.parameters, patterns, strict=False)
        self.masks = {p: pattern_mask(pattern, p.shape, generator) for p, pattern in masked}
        groups = [
            {"params": self.parameters[i :: len(RULES)], **rule}
            for i, rule in enumerate(RULES)
            if self.parameters[i :: len(RULES)]
        ]
        self.optimizer = SparseOpt(groups, masks=self.masks, backend=backend.name)

    def step(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters:
            p.grad = torch.randn(p.shape, generator=generator).to(self.dtype)
        self.optimizer.step()

    def state(self) -> list[Tensor]:
        buffers = [self.optimizer.state[p].get("momentum_buffer") for p in self.parameters]
        return [*self.parameters, *(b for b in buffers if b is not None)]


def assert_both_ways_agree(
    backend: Backend, shapes: list[tuple[int, int]], patterns: list[str], dtype: torch.dtype, seed: int
) -> None:
    """Of two networks, one has masks that are new in every step."""
    by_sectors, renewed = (Network(backend, shapes, patterns, dtype, seed) for _ in range(2))
    for step in range(3):
        by_sectors.step(step)
        for mask in renewed.masks.values():
            mask.copy_(mask.clone())
        renewed.step(step)
        for ours, theirs in zip(by_sectors.state(), renewed.state(), strict=True):
            assert same_bits(ours, theirs), (step, tuple(ours.shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_ways_have_the_same_bits(backend: Backend, dtype: torch.dtype) -> None:
    """Rows of 1 to 5000 weights, all kinds of masks."""
    patterns = [PATTERNS[i % len(PATTERNS)] for i in range(len(COLUMNS))]
    assert_both_ways_agree(backend, [(9, columns) for columns in COLUMNS], patterns, dtype, seed=0)
    rows = [5 if INTERPRETED and columns > 600 else 33 for columns in COLUMNS]
    assert_both_ways_agree(backend, [*zip(rows, COLUMNS, strict=True)], patterns[::-1], dtype, seed=1)


@settings(
    max_examples=3 if INTERPRETED else 15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 5000)), min_size=1, max_size=4),
    patterns=st.lists(st.sampled_from(PATTERNS), min_size=4, max_size=4),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_both_ways_have_the_same_bits_of_anything(
    backend: Backend, shapes: list[tuple[int, int]], patterns: list[str], dtype: torch.dtype, seed: int
) -> None:
    assert_both_ways_agree(backend, shapes, patterns, dtype, seed)


def test_each_way_is_gone(backend: Backend) -> None:
    """New masks in one pass, the next steps by lists: that the tests above compare two things."""
    kernels_of_plan: list[str] = []
    network = Network(backend, [(4, 64)], ["half"], torch.float32, 0)
    plan_class = gpu_plan.GpuPlan

    class Noting(plan_class):  # type: ignore[misc, valid-type]
        def step(self, inputs: Any) -> None:
            kernels_of_plan.append("one pass" if self._new else "sectors")
            super().step(inputs)

    with mock.patch.object(gpu_plan, "GpuPlan", Noting):
        for step in range(3):
            network.step(step)
        network.masks[network.parameters[0]].logical_not_()
        network.step(3)
        network.step(4)
    assert kernels_of_plan == ["one pass", "sectors", "sectors", "one pass", "sectors"]


# ---- lists ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 5, 8, 27, 147, 512, 1031])
def test_lists(backend: Backend, columns: int, dtype: torch.dtype, pattern: str) -> None:
    check_lists(backend, pattern_mask(pattern, (13, columns), torch.Generator().manual_seed(columns)), dtype)


def test_a_mask_of_other_bytes_than_1(backend: Backend) -> None:
    """PyTorch makes none, but a view of bytes may have them: whatever is not 0 is active."""
    check_lists(backend, torch.arange(-128, 128).to(torch.int8).view(torch.bool).view(4, 64), torch.float32)


@pytest.mark.parametrize("share", [0.0, 0.2, LISTED, 0.41, 0.9, 1.0])
def test_a_list_where_few_sectors_are_live(backend: Backend, share: float) -> None:
    """And no room for one that would not be by_sectors."""
    mask = torch.zeros(10, 80, dtype=torch.bool)
    mask.view(100, 8)[: round(100 * share), 3] = True
    placed = plan_of(backend, mask, torch.float32)._placed
    assert placed is not None
    (launch,) = placed.layout.launches
    (row,) = (SectorRow(*numbers) for numbers in launch.table.tolist())
    is_listed = share <= LISTED
    assert row.length == (round(100 * share) if is_listed else 100)
    assert (row.listed != 0) == is_listed


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_a_default_dtype(backend: Backend, default: torch.dtype) -> None:
    """What the kernels write has types of its own."""
    results = []
    for dtype in (torch.float32, default):
        network = Network(backend, [(9, 100), (4, 7)], ["half", "sparse90"], torch.float32, seed=0)
        for group in network.optimizer.param_groups:
            group["max_grad_norm"] = 1.0
        network.step(0)
        torch.set_default_dtype(dtype)
        try:
            for _ in range(3):
                network.optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        results.append(network.state())
    for usual, other in zip(*results, strict=True):
        assert same_bits(usual, other)


# ---- many groups, many weights ----------------------------------------------------------------------


def test_groups_of_several_launches(backend: Backend) -> None:
    """Each with a rule of its own, of which a launch carries eight."""
    results = []
    for name in (backend.name, "reference"):
        parameters = [Parameter(torch.ones(2, 16)) for _ in range(19)]
        masks = {p: torch.ones(p.shape, dtype=torch.bool) for p in parameters}
        groups = [
            {"params": [p], "lr": 0.01 * (1 + i), "momentum": 0.5 if i % 3 else 0.0}
            for i, p in enumerate(parameters)
        ]
        optimizer = SparseOpt(groups, masks=masks, backend=name)
        for step in range(3):
            for p in parameters:
                p.grad = torch.full_like(p, 1.0 + step)
            optimizer.step()
        results.append([float(p.detach()[0, 0]) for p in parameters])
    assert results[0] == pytest.approx(results[1], rel=1e-6)
    assert len(set(results[0])) == 19


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_of_64_bits(backend: Backend, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of tensors of 2^31 weights and more."""
    patterns = [PATTERNS[i % len(PATTERNS)] for i in range(len(COLUMNS))]
    shapes = [(9, columns) for columns in COLUMNS]
    usual, wide = (Network(backend, shapes, patterns, dtype, seed=2) for _ in range(2))
    for step in range(3):
        usual.step(step)
    monkeypatch.setattr(gpu_tables, "_WIDE", 1)
    for step in range(3):
        wide.step(step)
    for ours, theirs in zip(wide.state(), usual.state(), strict=True):
        assert same_bits(ours, theirs)
