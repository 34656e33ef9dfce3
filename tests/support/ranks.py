"""Scripts that run on several ranks at once: processes of their own, joined by gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import sparseopt_kernels

PROLOGUE = """
import sys
import torch
from torch import distributed as dist, nn

folder, rank, ranks = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/join", rank=rank, world_size=ranks)
"""

# What is left is the end of the interpreter, which a thread of gloo may abort: see is_aborted.
EPILOGUE = """
import os
torch.save(result, f"{folder}/{rank}.pt")
if dist.is_initialized():
    dist.destroy_process_group()
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
"""


def started(program: Sequence[object], folder: Path, ranks: int, **environment: str) -> subprocess.Popen[str]:
    """Start a program (a script or ``-m MODULE``, with arguments) under torchrun; with 0 ranks, without."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    source = str(Path(sparseopt_kernels.__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, *launcher, *map(str, program)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def is_aborted(err: str) -> bool:
    """Tell if a process under torchrun was aborted when all was done, and is to be started again.

    With PyTorch 2.13 that happens now and then where parameters were sharded: a thread of gloo is still
    there. Drivers of tests end by ``os._exit``, as the command does.
    """
    return "terminate called without an active exception" in err


def on_ranks(script: str, folder: Path, ranks: int = 2, seconds: float = 120.0) -> list[Any]:
    """Run a script on each rank, and return what each has put into ``result``.

    The script finds ``rank``, ``ranks``, ``torch``, ``dist`` and ``nn``, and a process group that is joined.
    """
    file = folder / "ranks.py"
    file.write_text(f"{PROLOGUE}\n{script}\n{EPILOGUE}")
    path = os.pathsep.join(
        [str(Path(sparseopt_kernels.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    ).rstrip(os.pathsep)
    processes = [
        subprocess.Popen(
            [sys.executable, str(file), str(folder), str(rank), str(ranks)],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(process.returncode for process in processes):
        pytest.fail("\n".join(f"rank {i}:\n{output}" for i, output in enumerate(outputs)))
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]
