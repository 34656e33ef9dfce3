"""How the tests of ``train`` call it: in this process, or in one that can be killed."""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import sparseopt_kernels
from sparseopt_kernels.lab.training.cli import add_parser

# A few steps per epoch, and masks that change within three epochs.
TINY: tuple[str, ...] = (
    "--epochs",
    "4",
    "--batch-size",
    "300",
    "--update-every",
    "3",
    "--seeds",
    "0",
    "1",
    "--threads",
    "1",
)
TINY += ("--warmup-epochs", "1", "--device", "cpu")

DRIVER = """
import argparse, sys
from sparseopt_kernels.lab.training.cli import add_parser
parser = argparse.ArgumentParser()
add_parser(parser.add_subparsers())
args = parser.parse_args()
sys.exit(args.run(args))
"""


def train(*options: object) -> int:
    """``train`` with these options in this process."""
    parser = argparse.ArgumentParser(prog="sparseopt")
    add_parser(parser.add_subparsers())
    args = parser.parse_args(["train", *map(str, options)])
    return args.run(args)


def start(folder: Path, *options: object, driver: str = DRIVER) -> subprocess.Popen[str]:
    """``train`` with these options in a process of its own."""
    source = str(Path(sparseopt_kernels.__file__).parents[1])
    path = os.pathsep.join([source, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return subprocess.Popen(
        [sys.executable, "-c", driver, "train", *map(str, options)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            out, err = process.communicate()
            pytest.fail(f"the process ended or hung first\n{out}\n{err}")
        time.sleep(0.005)


def rows(output: Path) -> list[dict[str, str]]:
    """The lines of results.csv without the times, which no run can repeat."""
    path = output / "results.csv"
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def process_of_rank(launcher: int, rank: int) -> int:
    """The process of a rank, by the environment that torchrun gave it."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for child in map(int, children):
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return child
    raise AssertionError(f"rank {rank} is not a child of {launcher}")
