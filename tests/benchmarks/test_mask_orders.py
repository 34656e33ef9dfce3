"""The lines that orders and groups of active weights touch: against brute force, and against the meter."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import mask_orders
import numpy as np
import pytest
import torch
from mask_orders import MEMORIES, MOVES, ORDERS, RANDOM, WIDTHS, Case, counts, live_lines
from networks import floor_bytes, resnet50
from torch import nn

ROOT = Path(__file__).parents[2]


def random_mask(*shape: int, density: float = 0.1) -> mask_orders.Bools:
    return np.random.default_rng(sum(shape)).random(shape) < density


@pytest.mark.parametrize("shape", [(6, 64), (5, 27), (4, 3, 3, 3), (1, 7)])
@pytest.mark.parametrize("width", WIDTHS)
def test_lines_by_brute_force(shape: tuple[int, ...], width: int) -> None:
    mask = random_mask(*shape)
    touched = {i // width for i, active in enumerate(mask.flatten().tolist()) if active}
    assert live_lines(mask, width) == len(touched)


@pytest.mark.parametrize("memory", MEMORIES, ids=lambda memory: memory.name)
def test_masks_as_they_are_cost_the_floor(memory: mask_orders.Memory) -> None:
    mask, bias = random_mask(24, 5, 3, 3, density=0.5), torch.zeros(24, dtype=torch.bfloat16)
    case = Case("small", RANDOM, 0.9, [mask], bias.numel())
    by_layout = {count.layout: count for count in counts(case) if count.arrangement == "as is"}
    weight = torch.zeros(1, dtype={4: torch.float32, 2: torch.bfloat16}[memory.itemsize])
    unmasked = 5 * memory.itemsize * bias.numel()
    for layout, in_memory in (("contiguous", mask), ("channels_last", mask.transpose(0, 2, 3, 1).copy())):
        floor = floor_bytes(weight, torch.from_numpy(in_memory), memory.line)
        assert by_layout[layout].step_bytes(case, memory) == floor + unmasked


def test_a_list_of_few_lines_is_shorter_than_the_bits() -> None:
    mask = np.zeros((64, 64), dtype=bool)
    mask[:3, 0] = True
    as_is = next(counts(Case("small", RANDOM, 0.9, [mask], 0)))
    assert as_is.live == {8: 3, 16: 3, 32: 3}
    assert as_is.mask_bytes == {8: 3 * (4 + 1), 16: 3 * (4 + 2), 32: 3 * (4 + 4)}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [(20, 40), (16, 8, 3, 3)], ids=str)
def test_an_order_is_a_permutation(order: str, shape: tuple[int, ...]) -> None:
    for pieces in MOVES.values():
        moved = pieces(random_mask(*shape))
        assert sorted(ORDERS[order](moved, 8)) == list(range(moved.shape[1]))


def test_pieces_are_in_the_order_of_memory() -> None:
    weight = torch.arange(2 * 4 * 3 * 5).view(2, 4, 3, 5)
    last = weight.contiguous(memory_format=torch.channels_last)
    in_memory = {"contiguous": weight.flatten(), "channels_last": last.permute(0, 2, 3, 1).flatten()}
    for (layout, _), pieces in MOVES.items():
        assert pieces(weight.numpy()).flatten().tolist() == in_memory[layout].tolist()


def test_the_greedy_order_finds_columns_that_belong_together() -> None:
    groups = np.zeros((12, 6), dtype=bool)
    groups[[0, 1, 2, 3, 4, 4, 7, 8, 9, 11], [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]] = True
    together = groups.repeat(8, axis=1)
    scattered = together[:, np.random.default_rng(0).permutation(48)]
    pieces = scattered[:, :, None]
    assert live_lines(scattered, 8) > live_lines(together, 8) == 10
    assert live_lines(pieces[:, mask_orders.greedily(pieces, 8)], 8) == 10


@pytest.mark.parametrize("size", [8, 16])
@pytest.mark.parametrize("columns", [64, 27])
def test_groups_are_active_as_one(size: int, columns: int) -> None:
    mask = mask_orders.in_groups(random_mask(400, columns), size)
    assert mask.shape == (400, columns)
    assert mask.mean() == pytest.approx(0.1, rel=0.1)
    for start in range(0, columns, size):
        group = mask[:, start : start + size]
        assert (group.any(axis=1) == group.all(axis=1)).all()


def test_no_order_touches_fewer_lines_than_packed_rows() -> None:
    case = Case("small", RANDOM, 0.9, [random_mask(32, 16, 3, 3), random_mask(10, 64)], 0)
    found = list(counts(case))
    fewest = next(count for count in found if count.arrangement == "rows packed").live
    assert fewest[8] == sum((-(-mask.reshape(len(mask), -1).sum(axis=1) // 8)).sum() for mask in case.masks)
    for count in found:
        if "groups" not in count.arrangement:
            assert all(count.live[width] >= fewest[width] for width in (8, 16)), count


def test_layers_of_resnet50_that_read_the_same_channels() -> None:
    inputs = mask_orders.resnet50_inputs()
    weights = [p for p in resnet50().parameters() if p.ndim > 1]
    readers: dict[int, list[torch.Tensor]] = {}
    for number, weight in zip(inputs, weights, strict=True):
        readers.setdefault(number, []).append(weight)
    assert all(len({weight.shape[1] for weight in same}) == 1 for same in readers.values())
    assert all(prod(weight.shape[2:]) == 1 for same in readers.values() if len(same) > 1 for weight in same)
    # The pool, and the sums of the four stages; the last of them goes to the classifier.
    assert [len(same) for same in readers.values() if len(same) > 1] == [2, 4, 5, 7, 3]


def test_the_table_has_each_case_and_arrangement(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(mask_orders, "NETWORKS", {"small": lambda: nn.Conv2d(8, 16, 3)})
    training = {"data": "digits", "epochs": 2, "update_every": 10}
    monkeypatch.setattr(mask_orders, "TRAININGS", {"trained": training})
    monkeypatch.setattr(mask_orders, "SPARSITIES", (0.5, 0.9))
    assert mask_orders.main(tmp_path / "table.csv") == 0
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    arrangements = {
        (network, masks, sparsity): [
            (row["layout"], row["arrangement"])
            for row in rows
            if (row["network"], row["masks"], row["sparsity"]) == (network, masks, sparsity)
        ]
        for network, masks in (("small", "random"), ("trained", "RigL"), ("trained", "SET"))
        for sparsity in ("0.5", "0.9")
    }
    assert [len(found) for found in arrangements.values()] == [14, 14, 6, 6, 6, 6]
    assert all(len(set(found)) == len(found) for found in arrangements.values())
    assert sum(map(len, arrangements.values())) == len(rows)
    assert all(int(row["live_8"]) >= int(row["live_16"]) >= int(row["live_32"]) for row in rows)
    assert capsys.readouterr().out.count("trained, SET masks") == len(MEMORIES)


# In a process of its own: Triton decides at import whether it interprets.
METER = """
import json
import sys

import numpy as np
import torch
from torch import nn

import traffic  # before what imports Triton
import mask_orders

torch.set_num_threads(1)

def metered(dtype, mask):
    layer = nn.Linear(mask.shape[1], len(mask), bias=False, dtype=dtype)
    found, = traffic.measure(layer, {layer.weight: torch.from_numpy(mask)})
    return found.sectors, found.pairs

def counted(itemsize, mask):
    widths = (memory.width for memory in mask_orders.MEMORIES if memory.itemsize == itemsize)
    return [5 * itemsize * width * mask_orders.live_lines(mask, width) for width in widths]

mask = np.random.default_rng(0).random((64, 1024)) < 0.15
pieces = mask[:, :, None]
masks = {
    "as is": mask,
    "greedily": mask[:, mask_orders.greedily(pieces, 8)],
    "groups of 16": mask_orders.in_groups(mask, 16),
}
results = [
    [name, str(dtype), metered(dtype, each), counted(dtype.itemsize, each)]
    for dtype in (torch.float32, torch.bfloat16)
    for name, each in masks.items()
]
print(json.dumps(results))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: nothing to meter"
)
def test_the_meter_sees_what_is_counted() -> None:
    path = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.run(
        [sys.executable, "-c", METER],
        env={**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    results: Any = json.loads(process.stdout.splitlines()[-1])
    assert len(results) == 6
    for name, dtype, metered, counted in results:
        # The mask's bits or a list come on top, and tables.
        assert all(c < m < 1.1 * c for m, c in zip(metered, counted, strict=True)), (name, dtype)
    before, greedy, grouped = (sum(counted) for _, _, _, counted in results[:3])
    assert before > 1.1 * greedy > 1.1 * grouped
