"""The scripts of ``examples/`` run as they are; those that go on after a stop do."""

from __future__ import annotations

import pickle
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from old_pytorch import needs_fsdp2
from ranks import is_aborted, started

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDED = {
    "with_accelerate.py": ["accelerate"],
    "with_lightning.py": ["lightning"],
    "with_trainer.py": ["transformers", "accelerate"],
}
"""The packages that are not installed with the tests."""
RESUMED = {
    "plain.py": "plain.pt",
    "fsdp2_dcp.py": "fsdp2/*/.metadata",
    "with_accelerate.py": "with_accelerate/0*/custom_checkpoint_1.pkl",
    "with_lightning.py": "with_lightning/last.ckpt",
    "with_trainer.py": "with_trainer/checkpoint-*/dst.pt",
}
"""What is written last when an epoch is saved."""

EXACT = ("plain.py", "fsdp2_dcp.py")
"""Those that give the same bits after a stop. Of the others, only what they print at the end is checked."""

pytestmark = pytest.mark.slow


def start(name: str, folder: Path, ranks: int) -> subprocess.Popen[str]:
    return started([EXAMPLES / name], folder, ranks, CUDA_VISIBLE_DEVICES="")


def check(name: str, folder: Path, ranks: int) -> str:
    """Run an example, check what it prints at its end, and return it."""
    for _ in range(3):
        process = start(name, folder, ranks)
        out, err = process.communicate(timeout=300)
        if not is_aborted(err):
            break
    assert process.returncode == 0, err
    accuracy = re.search(r"test accuracy\W+([0-9.]+)(%?)", out)
    assert accuracy is not None, out
    assert float(accuracy[1]) / (100 if accuracy[2] else 1) > 0.85
    assert re.search(r"weights .* 0\.9500 ", out), out
    return out


def stop_when_saved(process: subprocess.Popen[str], folder: Path, saved: str, end: signal.Signals) -> None:
    """End a process when it has just saved an epoch, not while it writes: not all engines survive that."""
    while process.poll() is None:
        if any(folder.glob(saved)):
            process.send_signal(signal.SIGSTOP)
            is_complete = all(map(can_be_read, folder.glob(saved)))
            if is_complete:
                process.send_signal(end)  # torchrun stops its ranks
            process.send_signal(signal.SIGCONT)
            if is_complete:
                break
        time.sleep(0.01)
    process.communicate()
    assert any(folder.glob(saved))


def can_be_read(path: Path) -> bool:
    if path.name == ".metadata":
        return True
    try:
        torch.load(path, weights_only=False)
    except (EOFError, RuntimeError, pickle.UnpicklingError):
        return False
    return True


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example(path: Path, tmp_path: Path) -> None:
    if path.name == "fsdp2_dcp.py" and needs_fsdp2.args[0]:
        pytest.skip(needs_fsdp2.kwargs["reason"])
    for package in NEEDED.get(path.name, ()):
        pytest.importorskip(package, reason=f"{package} is not installed")
    ranks = 2 if "torchrun" in path.read_text() else 0
    saved = RESUMED.get(path.name)
    if saved:
        process = start(path.name, tmp_path, ranks)
        stop_when_saved(process, tmp_path, saved, signal.SIGTERM if ranks else signal.SIGKILL)
    printed = check(path.name, tmp_path, ranks)
    if path.name in EXACT:  # masks and accuracy tell a run that went on from one that began anew
        (tmp_path / "whole").mkdir()
        assert printed == check(path.name, tmp_path / "whole", ranks)


def test_there_is_one_for_each_engine() -> None:
    lines = (EXAMPLES / "README.md").read_text()
    names = {path.name for path in EXAMPLES.glob("*.py")}
    assert set(re.findall(r"\(([a-z0-9_]+\.py)\)", lines)) == names
    assert set(RESUMED) <= names
    assert torch.distributed.is_available()
