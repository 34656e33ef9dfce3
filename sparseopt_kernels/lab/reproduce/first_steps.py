"""Keeps the losses of the first steps of one case beside a CSV file, and repeats these steps to check that
the code still trains as it did for the rows of the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ... import kernels
from ...kernels.cpu import CPU
from ..atomic import write_atomically
from ..machine import machine
from ..threads import pytorch_threads
from ..training.concentration import concentration_ignored
from ..training.errors import TrainingError
from ..training.run import Run
from .code_commit import code_commit
from .experiment import Settings, Trained
from .results import Results

STEPS = 50
UPDATE_EVERY = 12
"""Steps between updates of the masks, so that few steps show how they are updated and what follows."""
_FEWER = 20  # on another machine: later, roundings may have made RigL grow other weights
_CLOSE = 1e-4
_CLOSE_AFTER_UPDATE = 4e-3  # a weight more or less; without updates or skipped steps, losses are off by more


def first_steps_path(results: Path) -> Path:
    """Return the file of the first steps that belongs to a CSV file."""
    return results.with_name(f"{results.stem}-first-steps.json")


def check_or_write_first_steps(experiment: Trained, settings: Settings, results: Results) -> None:
    """Check the kept losses if the CSV file has rows, or else write them, before rows are added.

    Raises:
        TrainingError: this code does not repeat the kept losses, there are none, or their file cannot be
            read or written.
    """
    path = first_steps_path(results.path)
    if results.rows():
        if not path.exists():
            raise TrainingError(
                f"{results.path} has rows, and {path.name}, which tells if this code trains as it did for "
                "them, is not beside it: bring it back, or name another folder with --output"
            )
        kept = _read(path)
        if not repeats(experiment, settings, kept):
            raise TrainingError(
                f"{results.path} has rows of the code of {kept['commit'] or 'another commit'}, and this code "
                "trains otherwise: name another folder with --output, or go on with that commit"
            )
        return
    case = experiment.kept_case()
    content = {
        "case": case,
        "machine": machine(),
        "torch": torch.__version__,
        "commit": code_commit(),
        "update_every": UPDATE_EVERY,
        "losses": losses_of(experiment, case, settings, STEPS),
    }
    try:
        write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
    except OSError as error:
        raise TrainingError(f"cannot write {path}: {error}", exit_code=1) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        kept = json.loads(path.read_text())
        missing = {"case", "machine", "torch", "commit", "losses"} - kept.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise TrainingError(f"{path} cannot be read ({error}): bring it back") from error
    if missing:
        raise TrainingError(f"{path} has no {', '.join(sorted(missing))}: bring it back")
    return dict(kept)


def repeats(experiment: Trained, settings: Settings, kept: Mapping[str, Any]) -> bool:
    """Tell if this code repeats the kept losses: all of them exactly on the same processor with the same
    PyTorch, else the first 20: to 1e-4, and to 4e-3 after the first update of the masks."""
    is_native = kernels.backend_for(kernels.chosen_name("auto"), torch.device("cpu")) is CPU
    if is_native and (kept["machine"], kept["torch"]) == (machine(), torch.__version__):
        return bool(losses_of(experiment, kept["case"], settings, STEPS) == kept["losses"])
    again = losses_of(experiment, kept["case"], settings, _FEWER)
    bounds = [_CLOSE] * UPDATE_EVERY + [_CLOSE_AFTER_UPDATE] * (_FEWER - UPDATE_EVERY)
    former = kept["losses"][:_FEWER]
    close = [abs(a - b) <= bound for a, b, bound in zip(again, former, bounds, strict=False)]
    return len(again) == len(former) and all(close)  # a NaN is not close


def losses_of(experiment: Trained, case: dict[str, Any], settings: Settings, steps: int) -> list[float]:
    """Return the losses of the first steps of a case, computed with one thread as its rows are."""
    with pytorch_threads(1), concentration_ignored():
        return experiment.first_losses(case, settings, steps)


class _EnoughError(Exception):
    pass


def first_losses(run: Run, steps: int) -> list[float]:
    """Train a new ``run`` for ``steps`` steps, or to its end if that comes first.

    Returns:
        The loss of each step's batch, before the step.
    """
    losses: list[float] = []

    def look(model: nn.Module, inputs: tuple[Tensor, ...], scores: Tensor) -> None:
        if model.training:
            losses.append(float(F.cross_entropy(scores.detach().float(), run.batch[1])))

    def count() -> None:
        if len(losses) == steps:
            raise _EnoughError

    hook = run.model.register_forward_hook(look)
    with hook, suppress(_EnoughError):
        while not run.done:
            run.train_epoch(count)
    return losses
