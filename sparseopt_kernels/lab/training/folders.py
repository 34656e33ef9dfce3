"""Output folders: one that the user names, or the next free default one. Results are never overwritten."""

from __future__ import annotations

from itertools import count, takewhile
from pathlib import Path

from .errors import TrainingError
from .experiment import RESULTS
from .options import CHECKPOINT_NAME

RUNS = Path("runs")


def claim(folder: Path) -> Path:
    """Make a folder that the user named, and return it.

    Raises:
        TrainingError: it has the results of another experiment.
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
    """Make the next free of ``runs/NAME``, ``runs/NAME-2``, and so on, and return it.

    Raises:
        OSError: it cannot be made.
    """
    RUNS.mkdir(exist_ok=True)
    existing = default_folders(name)
    for number in count(len(existing) + 1):
        folder = RUNS / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:  # another process has just made it
            continue
        return folder
    raise AssertionError("unreachable")


def default_folders(name: str) -> list[Path]:
    """Return ``runs/NAME``, ``runs/NAME-2``, and so on, up to the first that does not exist."""
    names = (name if number == 1 else f"{name}-{number}" for number in count(1))
    return list(takewhile(Path.exists, (RUNS / name for name in names)))
