"""A table of the paper under torchrun, with sharded parameters."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from miniatures import make_cifar100

import sparseopt_kernels

DRIVER = """
import sys
from dataclasses import replace
from sparseopt_kernels.__main__ import main
from sparseopt_kernels.lab.reproduce.catalogue import EXPERIMENTS

table = EXPERIMENTS["table8"]
recipe = replace(table.recipe, batch_size=8, base_lr=0.01, warmup_epochs=1, update_every=1)
EXPERIMENTS["table8"] = replace(table, recipe=recipe, epochs=(2,), seeds=(0,))
sys.exit(main(["reproduce", "table8", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_a_table_with_sharded_parameters(tmp_path: Path) -> None:
    data = make_cifar100(tmp_path / "data", train=8)
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    rows = {}
    for parallel in ("ddp", "fsdp"):
        output = tmp_path / parallel
        options = [
            "--data-dir",
            data,
            "--output",
            output,
            "--device",
            "cpu",
            "--parallel",
            parallel,
            "--quiet",
        ]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        found = subprocess.run(
            [
                sys.executable,
                *launcher,
                str(script),
                *map(str, options),
                "--only",
                "sparsity=0.95",
                "ham=False",
            ],
            env={
                **os.environ,
                "PYTHONPATH": str(Path(sparseopt_kernels.__file__).parents[1]),
                "OMP_NUM_THREADS": "1",
            },
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert found.returncode == 0, found.stderr
        assert found.stdout.count("SparseOpt") > 0
        assert list((output / "table8-checkpoints").iterdir()) == []
        rows[parallel] = list(csv.DictReader((output / "table8.csv").open()))
    for whole, sharded in zip(rows["ddp"], rows["fsdp"], strict=True):
        assert (whole["optimizer"], whole["ranks"]) == (sharded["optimizer"], sharded["ranks"])
        assert whole["ranks"] == "2"
        assert float(sharded["train_loss"]) == pytest.approx(float(whole["train_loss"]), rel=1e-2)
        assert float(sharded["exploration_rate"]) == pytest.approx(float(whole["exploration_rate"]), rel=1e-2)
    assert {row["optimizer"] for row in rows["fsdp"]} == {"sgd", "sparseopt", "unnormalized", "scalar"}
