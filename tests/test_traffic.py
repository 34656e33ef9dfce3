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

ROOT = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton is not installed: nothing to meter"
    ),
]

# From here on, `live` is the predicate of all accesses of a tile of a masked layer: [ROWS, BYTES, 8].
PRELUDE = """
import json
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn

import traffic
from sparseopt_kernels.kernels import triton_plan, triton_step

torch.set_num_threads(1)
update = triton_step._update
folder = Path(sys.argv[1])

def with_another_predicate(change):
    def changed(at, e, active, live, *rest):
        if len(live.shape) == 3:
            change(live.handle.data)
        update(at, e, active, live, *rest)
    return patch.object(triton_step, "_update", changed)

def meter(*shapes):
    return traffic.main(
        {"small": lambda: nn.Sequential(*(nn.Linear(*shape) for shape in shapes))},
        (0.0, 0.9),
        folder / "traffic.csv",
    )
"""

MEASURE = """
def by_hand():
    layer = nn.Linear(512, 4, bias=False)
    mask = torch.zeros(4, 512, dtype=torch.bool)
    mask[0, 0] = True  # byte 0
    mask[1, [24, 31, 32]] = True  # byte 3, twice, and byte 4: two sectors of two pairs
    mask[3] = True  # row 2 is empty, row 3 full
    return traffic.measure(layer, {layer.weight: mask})[0]

def one_more(live):
    live[2, 5] = True

def many_shapes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 10, 3), nn.Linear(1040, 9), nn.Linear(1042, 3), nn.Linear(64, 30))
    return traffic.measure(model, traffic.sk.sparsify(model, 0.9, "erk"))

results = {"by_hand": by_hand(), "many_shapes": many_shapes()}
with with_another_predicate(one_more):
    results["one_more"] = by_hand()
with patch.multiple(traffic, _SHORT=triton_plan._SHORT, _LONG=triton_plan._LONG):
    results["true_tiles"] = many_shapes()
results["resnet50"] = [tuple(p.shape) for p in traffic.resnet50().parameters()]
results["status"] = meter((512, 32), (504, 4))
(folder / "results.json").write_text(json.dumps(results))
"""

WASTE = """
def all_of_it(live):
    live[:] = True

with patch.object(traffic, "_SHORT", {"ROWS": 4, "BYTES": 64}), with_another_predicate(all_of_it):
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
    live_sectors, live_pairs, mask_bytes = 1 + 2 + 0 + 64, 1 + 2 + 0 + 32, 4 * 512 // 8
    # A row of the table (72 bytes), the gradient's address, the owner, the mean fan-in.
    tables, tables_in_pairs = 3 + 1 + 1 + 1, 2 + 1 + 1 + 1
    assert results["by_hand"] == [
        *("weight", 512, 4 * 512),
        5 * 32 * live_sectors + mask_bytes,
        5 * 32 * live_sectors + mask_bytes + 32 * tables,
        5 * 64 * live_pairs + mask_bytes + 64 * tables_in_pairs,
    ]


def test_one_sector_more_is_seen(results: Any) -> None:
    *layer, floor, sectors, pairs = results["by_hand"]
    assert results["one_more"] == [*layer, floor, sectors + 5 * 32, pairs + 5 * 64]


def test_tiles_change_nothing_about_the_traffic(results: Any) -> None:
    for layer, of_true_tiles in zip(results["many_shapes"], results["true_tiles"], strict=True):
        assert layer[:4] == of_true_tiles[:4]
        assert layer[4:] == pytest.approx(of_true_tiles[4:], rel=1e-12)


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
