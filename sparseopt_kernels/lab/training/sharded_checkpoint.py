"""The state of a run as a checkpoint file keeps it.

If parameters are sharded (``--parallel fsdp``), each rank saves its part in a folder beside the file, by
``torch.distributed.checkpoint``, and any number of ranks can load it. The file names the folder that is
complete; it is replaced when the next one is complete, too.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import TrainingError
from .run import Run

if TYPE_CHECKING:
    from torch.distributed.checkpoint.api import CheckpointException


def shards_folder(file: Path) -> Path:
    """Return the folder beside a checkpoint file."""
    return file.with_name(f"{file.name}-shards")


def state_for(file: Path, run: Run) -> dict[str, Any]:
    """Return what a checkpoint file keeps of a run. All ranks must call it: sharded parameters are saved
    here.

    Raises:
        TrainingError: the folder cannot be written, on any rank.
    """
    if not run.is_sharded:
        return run.state_dict()
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.api import CheckpointException

    folder = shards_folder(file) / f"{run.optimizer_name}-seed{run.seed}-epoch{run.epoch}"
    try:
        checkpoint.save(run.state_dict(), checkpoint_id=folder)
    except CheckpointException as error:
        raise TrainingError(
            f"cannot write the checkpoint {folder} ({_reason(error)})", exit_code=1
        ) from error
    return {"folder": folder.name}


def load_from(file: Path, run: Run, state: dict[str, Any]) -> None:
    """Continue a run from what :func:`state_for` returned. All ranks must call it.

    Raises:
        TrainingError: the folder is not there, or not complete.
    """
    if "folder" not in state:
        run.load_state_dict(state)
        return
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.api import CheckpointException

    own, folder = run.state_dict(), shards_folder(file) / state["folder"]
    try:
        checkpoint.load(own, checkpoint_id=folder)
    except CheckpointException as error:
        raise TrainingError(
            f"{folder}, to which {file.name} belongs, cannot be read ({_reason(error)}): put both there "
            "again, or start anew"
        ) from error
    run.load_state_dict(own)


def remove_others(file: Path, state: dict[str, Any] | None = None) -> None:
    """Remove the folders beside a checkpoint file, but the one that its state is in."""
    kept = (state or {}).get("folder")
    for folder in shards_folder(file).glob("*"):
        if folder.name != kept:
            shutil.rmtree(folder, ignore_errors=True)  # what cannot be removed now is removed the next time
    if kept is None:
        shutil.rmtree(shards_folder(file), ignore_errors=True)


def _reason(error: CheckpointException) -> str:
    rank, (failure, _) = next(iter(error.failures.items()))
    return f"rank {rank}: {(str(failure) or repr(failure)).splitlines()[0]}"
