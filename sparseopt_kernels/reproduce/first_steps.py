"""The losses of the first steps of one case, kept beside a CSV file: whether today's code still makes its
rows is found out by making these steps again.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ..atomic import write_atomically
from ..machine import machine
from ..training.errors import TrainingError
from ..training.run import Run
from .code_commit import code_commit
from .experiment import Settings, Trained

STEPS = 50


def first_steps_path(results: Path) -> Path:
    """Return where the first steps of the experiment with this CSV file are."""
    return results.with_name(f"{results.stem}-first-steps.json")


def write_first_steps(experiment: Trained, settings: Settings, results: Path) -> None:
    """Make the first steps of the first case and keep their losses beside the CSV file ``results``.

    Raises:
        TrainingError: the file cannot be written.
    """
    case = experiment.cases([])[0]
    content = {
        "case": case,
        "machine": machine(),
        "torch": torch.__version__,
        "commit": code_commit(),
        "losses": losses_of(experiment, case, settings, STEPS),
    }
    path = first_steps_path(results)
    try:
        write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
    except OSError as error:
        raise TrainingError(f"cannot write {path}: {error}", exit_code=1) from error


def losses_of(experiment: Trained, case: dict[str, Any], settings: Settings, steps: int) -> list[float]:
    """Return the losses of the first steps of a case, made with one thread as its rows are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return experiment.first_losses(case, settings, steps)
    finally:
        torch.set_num_threads(threads)


class _EnoughError(Exception):
    pass


def first_losses(run: Run, steps: int) -> list[float]:
    """Train ``run``, which is at its start, for a number of steps, or to its end if that comes first.

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
