"""Checkpoints: one file that holds the finished runs of an experiment and the run in progress."""

from __future__ import annotations

import io
import pickle
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..atomic import write_atomically
from .errors import TrainingError
from .run import Row

_FORMAT = "sparseopt_kernels training checkpoint"
_VERSION = 1


@dataclass
class FinishedRun:
    """A finished run: its name, and the fan-in of each neuron before and after training, by layer."""

    optimizer: str
    seed: int
    initial_fan_in: dict[str, list[int]]
    fan_in: dict[str, list[int]]


@dataclass
class Progress:
    """The progress of an experiment. ``current`` is the ``state_dict`` of the run in progress."""

    rows: list[Row] = field(default_factory=list)
    finished: list[FinishedRun] = field(default_factory=list)
    current: dict[str, Any] | None = None

    def is_finished(self, optimizer: str, seed: int) -> bool:
        return any((run.optimizer, run.seed) == (optimizer, seed) for run in self.finished)


@dataclass
class Checkpoint:
    """The content of a checkpoint file.

    ``config`` is a :meth:`Config.to_dict`; ``output`` is the output folder, relative to the file's folder.
    """

    config: dict[str, Any]
    output: str
    progress: Progress


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write the file atomically: if the process is killed, the former or the new checkpoint is complete.

    Raises:
        TrainingError: the file cannot be written (a full disk, say). The former checkpoint is still there.
    """
    content = io.BytesIO()
    torch.save(
        {
            "format": _FORMAT,
            "version": _VERSION,
            "config": checkpoint.config,
            "output": checkpoint.output,
            "rows": [asdict(row) for row in checkpoint.progress.rows],
            "finished": [asdict(run) for run in checkpoint.progress.finished],
            "current": checkpoint.progress.current,
        },
        content,
    )
    try:
        write_atomically(path, content.getvalue())
    except OSError as error:
        kept = ": the one before it is still there" if path.exists() else ""
        raise TrainingError(f"cannot write the checkpoint {path} ({error}){kept}", exit_code=1) from error


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a file of :func:`save_checkpoint`, with its tensors on the CPU.

    Raises:
        TrainingError: there is no such file, it is damaged, or it is not a checkpoint of this version.
    """
    try:
        # torch.load does not check the checksums of the archive.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise TrainingError(f"{path} is damaged (the checksum of {damaged!r} is wrong): {_DAMAGED}")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise TrainingError(
            f"there is no checkpoint {path}: --resume continues what was started with --checkpoint"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise TrainingError(f"{path} cannot be read as a checkpoint ({reason}): {_DAMAGED}") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise TrainingError(f"{path} is not a checkpoint of this command: {_DAMAGED}")
    if content["version"] != _VERSION:
        raise TrainingError(
            f"{path} has checkpoint version {content['version']}, this release reads version {_VERSION}: "
            "continue it with the release that wrote it"
        )
    progress = Progress(
        [Row(**row) for row in content["rows"]],
        [FinishedRun(**run) for run in content["finished"]],
        content["current"],
    )
    return Checkpoint(content["config"], content["output"], progress)


_DAMAGED = "name the right file with --resume, or start again without it"
