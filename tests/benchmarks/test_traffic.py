"""The traffic meter, on layers that one can count by hand.

In processes of their own: Triton decides at import whether it interprets.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton is not installed: nothing to meter"
    ),
]

# `live` is the predicate of the accesses of half a sector, [SECTORS, 4]. Rests of tensors, of one sector, are
# left as they are.
PRELUDE = """
import json
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn

import traffic
from sparseopt_kernels.kernels.gpu import lists, triton_sectors, triton_step
from sparseopt_kernels.kernels.gpu.triton import TritonKernels

torch.set_num_threads(1)
folder = Path(sys.argv[1])

def with_another_predicate(change):
    def changed(function):
        def accessed(at, e, *rest):
            live = rest[1] if len(rest) > 2 else rest[0]
            if len(live.shape) == 2 and live.shape[0] > 1:
                change(live.handle.data)
            return function(at, e, *rest)
        return accessed
    return patch.multiple(
        triton_step, _read=changed(triton_step._read), _write=changed(triton_step._write)
    )

def meter(*shapes):
    return traffic.main(
        {"small": lambda: nn.Sequential(*(nn.Linear(*shape) for shape in shapes))},
        (0.0, 0.9),
        folder / "traffic.csv",
    )
"""

MEASURE = """
def mask_by_hand():
    mask = torch.zeros(4, 512, dtype=torch.bool)
    mask[0, 0] = True  # byte 0
    mask[1, [24, 31, 32]] = True  # byte 3, twice, and byte 4: two sectors of two pairs
    mask[3] = True  # row 2 is empty, row 3 full
    return mask

def by_hand(dtype=torch.float32):
    layer = nn.Linear(512, 4, bias=False, dtype=dtype)
    return traffic.measure(layer, {layer.weight: mask_by_hand()})[0]

def one_more(live):
    live[5] = True

def many_shapes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 10, 3), nn.Linear(1040, 9), nn.Linear(1042, 3), nn.Linear(64, 30))
    return traffic.measure(model, traffic.sk.sparsify(model, 0.9, "erk"))

def long_rows(columns):
    torch.manual_seed(0)
    models = [nn.Linear(columns, 150_000 // columns, bias=False) for _ in range(3)]
    sparsities = (0.5, 0.9, 0.99)
    return [traffic.measure(m, traffic.sk.sparsify(m, s))[0] for m, s in zip(models, sparsities)]

results = {
    "by_hand": by_hand(),
    "half": by_hand(torch.float16),
    "many_shapes": many_shapes(),
    "long_rows": [long_rows(columns) for columns in (27, 147)],
}
with patch.object(lists, "LISTED", 0.0):
    results["all_sectors"] = by_hand()
    with with_another_predicate(one_more):
        results["one_more"] = by_hand()
with patch.multiple(traffic, _CHUNK=32, _ROWS=2):
    results["true_tiles"] = many_shapes()
results["resnet50"] = [tuple(p.shape) for p in traffic.resnet50().parameters()]
results["status"] = meter((512, 32), (504, 4))
(folder / "results.json").write_text(json.dumps(results))
"""

WASTE = """
chunk = triton_sectors.chunk_with

def all_of_it(entry, *rest):
    found = chunk(entry, *rest)
    found.active.handle.data[found.sector.handle.data * 8 < entry.elements.handle.data] = 255
    return found

with (
    patch.object(traffic, "BOUND_WEIGHTS", 1000),
    patch.object(lists, "LISTED", 0.0),
    patch.object(triton_sectors, "chunk_with", all_of_it),
    patch.object(triton_step, "chunk_with", all_of_it),
):
    sys.exit(meter((512, 32), (512, 24)))
"""


def run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + script, str(folder)],
        env={**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the results of MEASURE are."""
    folder = tmp_path_factory.mktemp("traffic")
    process = run(MEASURE, folder)
    assert process.returncode == 0, process.stderr
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> Any:
    return json.loads((folder / "results.json").read_text())


def test_a_layer_counted_by_hand(results: Any) -> None:
    """67 of 256 sectors are live: few enough for a list."""
    live_sectors, live_pairs = 1 + 2 + 0 + 64, 1 + 2 + 0 + 32
    listed, factors = (4 + 1) * live_sectors, 32
    # The numbers of sectors, their mask bits, c_i; a row of the table (104 bytes), the gradient's address,
    # the number of chunks, and three owners of chunks.
    lists, tables, owners = 9 * 32 + 3 * 32 + 32, 3 * 32 + 32 + 32, 3 * 4
    lists_in_pairs, tables_in_pairs = 5 * 64 + 2 * 64 + 64, 2 * 64 + 64 + 64
    assert results["by_hand"] == [
        *("weight", 512, 4 * 512, 4),
        5 * 32 * live_sectors + listed + factors,
        5 * 32 * live_sectors + lists + tables + owners,
        5 * 64 * live_pairs + lists_in_pairs + tables_in_pairs + owners,
    ]


def test_half_precision_counted_by_hand(results: Any) -> None:
    """A sector is 16 weights: bytes 3 and 4 are in two of them. 35 of 128 are live."""
    live_sectors, live_pairs = 1 + 2 + 0 + 32, 1 + 2 + 0 + 16
    *_, floor, sectors, pairs = results["half"]
    assert floor == 5 * 32 * live_sectors + (4 + 2) * live_sectors + 32
    lists, tables, owners = 5 * 32 + 3 * 32 + 32, 3 * 32 + 32 + 32, 2 * 4
    assert sectors == 5 * 32 * live_sectors + lists + tables + owners
    assert pairs == 5 * 64 * live_pairs + (3 + 2 + 1) * 64 + (2 + 1 + 1) * 64 + owners


def test_one_sector_more_is_seen(results: Any) -> None:
    *layer, sectors, pairs = results["all_sectors"]
    assert results["one_more"] == [*layer, sectors + 5 * 32, pairs + 5 * 64]


def test_tiles_change_nothing_about_the_traffic(results: Any) -> None:
    for layer, of_true_tiles in zip(results["many_shapes"], results["true_tiles"], strict=True):
        assert layer[:5] == of_true_tiles[:5]
        assert layer[5:] == pytest.approx(of_true_tiles[5:], rel=1e-2)


def test_no_row_length_costs_more(results: Any) -> None:
    """At most 1.02 of the floor, of layers that are large enough for tables not to count."""
    for by_sparsity in results["long_rows"]:
        for name, columns, weights, _, floor, sectors, pairs in by_sparsity:
            assert floor <= sectors <= 1.02 * floor, (name, columns, weights)
            assert sectors <= pairs <= 2 * sectors


def test_resnet50_has_its_parameters(results: Any) -> None:
    shapes = results["resnet50"]
    assert sum(len(shape) > 1 for shape in shapes) == 53 + 1
    assert sum(map(prod, shapes)) == 25_557_032


def test_within_the_bound(results: Any, folder: Path) -> None:
    assert results["status"] == 0
    header, *rows = (line.split(",") for line in (folder / "traffic.csv").read_text().splitlines())
    assert [row[header.index("columns")] for row in rows] == ["all", "dense", "504", "512"] * 2


def test_over_the_bound(tmp_path: Path) -> None:
    process = run(WASTE, tmp_path)
    assert process.returncode == 1, process.stderr
    complaints = [line for line in process.stderr.splitlines() if "times the floor" in line]
    assert [line.split(" touches")[0] for line in complaints] == [
        "small, sparsity 0.9: 0.weight, of 512 columns,",
        "small, sparsity 0.9: 1.weight, of 512 columns,",
    ]
