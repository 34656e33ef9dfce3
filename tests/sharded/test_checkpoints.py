"""Checkpoints by ``torch.distributed.checkpoint``: saved on some ranks and loaded on others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from old_pytorch import needs_fsdp2
from ranks import on_ranks
from sharded_training import support_path, train_from

pytestmark = [pytest.mark.slow, needs_fsdp2]

PROLOGUE = f"""
sys.path.insert(0, {support_path()!r})
from sharded_training import *
from torch.distributed.device_mesh import init_device_mesh

mesh = init_device_mesh("cpu", (ranks,))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where 4 ranks have saved after 9 steps, and before the first one; and in pairs of replicas."""
    folder = tmp_path_factory.mktemp("saved")
    save = {0: str(folder / "begin"), 9: str(folder / "middle")}
    hybrid = {9: str(folder / "hybrid")}
    script = f"""{PROLOGUE}
replicas = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
result = train_from(None, 18, mesh, save={save!r})
train_from(None, 10, replicas, save={hybrid!r})
"""
    torch.save(on_ranks(script, folder, ranks=4)[0], folder / "whole.pt")
    return folder


@pytest.mark.parametrize("saved", ["begin", "middle"])
def test_on_another_number_of_ranks(folder: Path, saved: str, tmp_path: Path) -> None:
    path, steps = folder / saved, 18 if saved == "begin" else 9
    script = f"{PROLOGUE}\nresult = train_from({str(path)!r}, {steps}, mesh)"
    _check_same(on_ranks(script, tmp_path, ranks=2)[0], torch.load(folder / "whole.pt"))


def test_saved_by_replicas_and_by_others_while_training_goes_on(folder: Path, tmp_path: Path) -> None:
    """HSDP's checkpoint, loaded on two ranks; these save again by ``async_save``, and one process goes on."""
    script = f"""{PROLOGUE}
again = folder + "/again"
result = train_from({str(folder / "hybrid")!r}, 9, mesh, save_while_training={{13: again}})
"""
    _check_same(on_ranks(script, tmp_path, ranks=2)[0], torch.load(folder / "whole.pt"))
    _check_same(train_from(str(tmp_path / "again"), 5), torch.load(folder / "whole.pt"))


@pytest.mark.parametrize("saved", ["begin", "middle", "hybrid"])
def test_in_one_process(folder: Path, saved: str) -> None:
    _check_same(
        train_from(str(folder / saved), 18 if saved == "begin" else 9), torch.load(folder / "whole.pt")
    )


def test_a_plain_checkpoint_on_two_ranks(folder: Path, tmp_path: Path) -> None:
    train_from(None, 9, plain=str(tmp_path / "plain.pt"))
    script = f"{PROLOGUE}\nresult = train_from(None, 9, mesh, load_plain={str(tmp_path / 'plain.pt')!r})"
    _check_same(on_ranks(script, tmp_path, ranks=2)[0], torch.load(folder / "whole.pt"))


def _check_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for what in ("parameters", "buffers", "masks", "explored"):
        assert all(map(torch.equal, found[what], expected[what])), what
        assert len(found[what]) == len(expected[what])
