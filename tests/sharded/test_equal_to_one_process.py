"""Training with FSDP2 gives the bits of one process: weights, momentum, masks, and what is told of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from old_pytorch import needs_fsdp2
from ranks import on_ranks
from sharded_training import CASES, support_path, train

pytestmark = needs_fsdp2


def train_on_ranks(folder: Path, ranks: int, sharded: list[str], hybrid: list[str]) -> dict[str, Any]:
    """Return what rank 0 has at the end of these cases: rows shared by all ranks, or by pairs of replicas."""
    script = f"""
sys.path.insert(0, {support_path()!r})
from sharded_training import CASES, train
from torch.distributed.device_mesh import init_device_mesh

shards = init_device_mesh("cpu", (ranks,))
result = {{"sharded": {{name: train(CASES[name], shards) for name in {sharded!r}}}}}
if {hybrid!r}:
    replicas = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    result["hybrid"] = {{name: train(CASES[name], replicas) for name in {hybrid!r}}}
"""
    found: dict[str, Any] = on_ranks(script, folder, ranks, seconds=400)[0]
    return found


def check_as_one_process(found: dict[str, Any]) -> None:
    for kind, cases in found.items():
        for name, many in cases.items():
            one = train(CASES[name])
            for what in ("parameters", "buffers", "masks"):
                for a, b in zip(one[what], many[what], strict=True):
                    assert torch.equal(a, b), (kind, name, what)
            assert many["numbers"] == one["numbers"], (kind, name)
            if one["method"] is not None:
                unions = zip(one["method"].pop("explored"), many["method"].pop("explored"), strict=True)
                assert all(torch.equal(a, b) for a, b in unions), (kind, name)
                assert many["method"] == one["method"], (kind, name)


def test_one_case_of_each(tmp_path: Path) -> None:
    check_as_one_process(
        train_on_ranks(tmp_path, 4, ["changed by hand", "ties"], ["largest weights", "SET, min_fan_in"])
    )


@pytest.mark.slow
def test_all_cases_on_four_ranks(tmp_path: Path) -> None:
    hybrid = ["RigL", "norm over all positions, HAM"]
    check_as_one_process(train_on_ranks(tmp_path, 4, [*CASES], hybrid))


@pytest.mark.slow
def test_on_two_ranks(tmp_path: Path) -> None:
    cases = ["SET", "RigL", "RigL corrected", "GMP", "norm"]
    check_as_one_process(train_on_ranks(tmp_path, 2, cases, []))
