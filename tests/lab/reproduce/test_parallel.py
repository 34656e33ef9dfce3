"""A table of the paper under torchrun, with sharded parameters."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from miniatures import make_cifar100
from old_pytorch import needs_fsdp2
from ranks import started
from train_command import process_of_rank, wait_until

DRIVER = """
import os
import sys
from dataclasses import replace
from sparseopt_kernels.__main__ import main
from sparseopt_kernels.lab.reproduce.catalogue import EXPERIMENTS

table = EXPERIMENTS["table8"]
recipe = replace(table.recipe, batch_size=8, base_lr=0.01, warmup_epochs=1, update_every=2)
EXPERIMENTS["table8"] = replace(table, recipe=recipe, epochs=(int(sys.argv[1]),), seeds=(0,))
code = main(["reproduce", "table8", *sys.argv[2:]])
sys.stdout.flush()
os._exit(code)  # see ranks.is_aborted
"""


def start(folder: Path, ranks: int, epochs: int, *options: object) -> subprocess.Popen[str]:
    script = folder / "driver.py"
    script.write_text(DRIVER)
    where = ["--data-dir", folder / "data", "--device", "cpu", "--quiet"]
    return started([script, epochs, *where, *options], folder, ranks)


@needs_fsdp2
@pytest.mark.slow
def test_a_table_with_sharded_parameters(tmp_path: Path) -> None:
    make_cifar100(tmp_path / "data", train=8)
    rows = {}
    for parallel in ("ddp", "fsdp"):
        output = tmp_path / parallel
        options = ("--output", output, "--parallel", parallel, "--only", "sparsity=0.95", "ham=False")
        process = start(tmp_path, 2, 2, *options)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert out.count("SparseOpt") > 0
        assert list((output / "table8-checkpoints").iterdir()) == []
        rows[parallel] = list(csv.DictReader((output / "table8.csv").open()))
    for whole, sharded in zip(rows["ddp"], rows["fsdp"], strict=True):
        assert (whole["optimizer"], whole["ranks"]) == (sharded["optimizer"], sharded["ranks"])
        assert whole["ranks"] == "2"
        assert float(sharded["train_loss"]) == pytest.approx(float(whole["train_loss"]), rel=1e-2)
        assert float(sharded["exploration_rate"]) == pytest.approx(float(whole["exploration_rate"]), rel=1e-2)
    assert {row["optimizer"] for row in rows["fsdp"]} == {"sgd", "sparseopt", "unnormalized", "scalar"}


@needs_fsdp2
@pytest.mark.slow
def test_a_rank_that_dies_and_another_number_of_ranks_that_goes_on(tmp_path: Path) -> None:
    make_cifar100(tmp_path / "data", train=8)
    only = ("--only", "sparsity=0.95", "clip=dense", "ham=False", "optimizer=sparseopt")
    options = ("--output", tmp_path / "out", "--parallel", "fsdp", *only)
    process = start(tmp_path, 2, 12, *options)
    checkpoints = tmp_path / "out" / "table8-checkpoints"
    wait_until(lambda: any(checkpoints.glob("*.pt")), process)
    os.kill(process_of_rank(process.pid, 1), signal.SIGKILL)
    started = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert time.monotonic() - started < 20
    [file] = checkpoints.glob("*.pt")
    assert f"The last complete checkpoint is {file}. Run the same command again to continue" in err

    process = start(tmp_path, 2, 12, *options[:2], *only)
    assert f"{file} was made with --parallel fsdp: do the same now" in process.communicate(timeout=300)[1]
    process = start(tmp_path, 1, 12, *options)
    assert process.communicate(timeout=300)[1] == ""
    [row] = csv.DictReader((tmp_path / "out" / "table8.csv").open())
    assert (row["ranks"], row["status"]) == ("1", "ok")
