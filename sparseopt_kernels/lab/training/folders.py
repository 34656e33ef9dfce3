"""Where results go: a folder that the user named, or the next free one; never over the results of others."""

from __future__ import annotations

from itertools import count, takewhile
from pathlib import Path

from .errors import TrainingError
from .experiment import RESULTS
from .options import CHECKPOINT_NAME

RUNS = Path("runs")


def claim(folder: Path) -> Path:
    """Make a folder that the user named, unless it has the results of another experiment.

    Raises:
        TrainingError: it has.
        OSError: it cannot be made.
    """
    for name in (RESULTS, CHECKPOINT_NAME):
        if (folder / name).exists():
            raise TrainingError(
                f"--output {folder} has the results of another experiment ({name}): name another folder, or "
                "continue that one with --resume"
            )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def claim_default(name: str) -> Path:
    """Make the next of ``runs/NAME``, ``runs/NAME-2``, and so on; ``OSError`` if that fails."""
    RUNS.mkdir(exist_ok=True)
    existing = default_folders(name)
    for number in count(len(existing) + 1):
        folder = RUNS / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:  # by another process, just now
            continue
        return folder
    raise AssertionError("unreachable")


def default_folders(name: str) -> list[Path]:
    """``runs/NAME``, ``runs/NAME-2``, and so on as far as there are any."""
    names = (name if number == 1 else f"{name}-{number}" for number in count(1))
    return list(takewhile(Path.exists, (RUNS / name for name in names)))
