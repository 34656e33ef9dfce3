"""Several ranks: torchrun and gloo on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import started

from sparseopt_kernels.lab.training import distributed
from sparseopt_kernels.lab.training.errors import TrainingError
from sparseopt_kernels.lab.training.run import _check_share

# Trains two epochs, and puts down what each rank has then.
DRIVER = """
import os
import sys
import torch
from torch import nn
from sparseopt_kernels.lab.training import distributed, run
from sparseopt_kernels.lab.training.config import new_config
from sparseopt_kernels.lab.training.data import load_dataset
from sparseopt_kernels.sharding import gathered

folder, method, batch_norm, parallel = sys.argv[1], sys.argv[2], sys.argv[3] == "with", sys.argv[4]

def without_batch_norm(name, image_shape, num_classes):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, num_classes))
    return model

if not batch_norm:
    run.build_model = without_batch_norm
torch.set_num_threads(1)
given = {"method": method, "epochs": 2, "batch_size": 301, "update_every": 2, "device": "cpu", "lr": 0.05}
given["parallel"] = parallel
with distributed.joined("cpu"):
    trained = run.Run(new_config(given), load_dataset("digits"), "sparseopt", 3)
    before = {k: v.clone() for k, v in trained.weights().items()}
    rows = [trained.train_epoch() for _ in range(2)]
    torch.save(
        {
            "before": before,
            "model": trained.weights(),
            "momentum": [
                gathered(s["momentum_buffer"]) for s in trained.optimizer.state.values()
            ],
            "rows": [(r.train_loss, r.train_accuracy, r.test_loss, r.test_accuracy) for r in rows],
        },
        f"{folder}/{distributed.ranks()}-{distributed.rank()}.pt",
    )
os._exit(0)  # see ranks.is_aborted
"""


def trained(folder: Path, ranks: int, *arguments: str) -> list[dict]:
    """What each of the ranks has after training."""
    script = folder / "driver.py"
    script.write_text(DRIVER)
    process = started([script, folder, *arguments], folder, ranks)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return [torch.load(folder / f"{ranks}-{rank}.pt") for rank in range(ranks)]


def masks(state: dict) -> dict:
    return {name: value for name, value in state.items() if name.endswith("_mask")}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rigl", "set"])
def test_two_ranks_have_the_same_weights_masks_and_figures(tmp_path, method):
    first, second = trained(tmp_path, 2, method, "with", "ddp")
    assert first["model"].keys() == second["model"].keys()
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name  # running statistics, too
    for a, b in zip(first["momentum"], second["momentum"], strict=True):
        assert torch.equal(a, b)
    assert first["rows"] == second["rows"]
    changed = [not torch.equal(m, first["model"][name]) for name, m in masks(first["before"]).items()]
    assert any(changed)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_are_one_with_the_whole_batch(tmp_path, parallel):
    """Without batch normalisation, up to the order of sums. With it they cannot be: each rank normalises by
    the mean and variance of its own half."""
    two = trained(tmp_path, 2, "rigl", "without", parallel)[0]
    [one] = trained(tmp_path, 1, "rigl", "without", "ddp")
    for a, b in zip(one["momentum"], two["momentum"], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
    for name, mask in masks(one["model"]).items():
        assert torch.equal(mask, two["model"][name]), name
        assert not torch.equal(mask, one["before"][name])
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.tensor(two["rows"]), torch.tensor(one["rows"]), rtol=1e-5, atol=1e-6)


def test_each_example_of_a_batch_goes_to_one_rank(monkeypatch):
    batch = torch.arange(7)
    monkeypatch.setattr(distributed, "ranks", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(distributed.share_of(batch))
    assert torch.equal(torch.cat(shares), batch)
    assert sorted(map(len, shares)) == [2, 2, 3]


def test_a_batch_that_is_too_small_for_the_ranks(monkeypatch):
    monkeypatch.setattr(distributed, "ranks", lambda: 4)
    _check_share(8)
    with pytest.raises(TrainingError, match="a batch of 7 is shared by 4 ranks"):
        _check_share(7)
