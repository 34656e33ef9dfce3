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
_CLOSE = 1e-6
"""How close losses in float64 are on another processor: roundings change them by less than 1e-14 (with SSE,
AVX2 and AVX-512). In float32 they would make RigL soon grow other weights of ResNet-20."""


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
        "losses": losses_of(experiment, case, settings, torch.float32),
        "losses_in_float64": losses_of(experiment, case, settings, torch.float64),
    }
    try:
        write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
    except OSError as error:
        raise TrainingError(f"cannot write {path}: {error}", exit_code=1) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        kept = json.loads(path.read_text())
        missing = {"case", "machine", "torch", "commit", "losses", "losses_in_float64"} - kept.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise TrainingError(f"{path} cannot be read ({error}): bring it back") from error
    if missing:
        raise TrainingError(f"{path} has no {', '.join(sorted(missing))}: bring it back")
    return dict(kept)


def repeats(experiment: Trained, settings: Settings, kept: Mapping[str, Any]) -> bool:
    """Tell if this code repeats the kept losses: exactly on the same processor with the same PyTorch, else
    those in float64 to 1e-6."""
    is_native = kernels.backend_for(kernels.chosen_name("auto"), torch.device("cpu")) is CPU
    if is_native and (kept["machine"], kept["torch"]) == (machine(), torch.__version__):
        return bool(losses_of(experiment, kept["case"], settings, torch.float32) == kept["losses"])
    again = losses_of(experiment, kept["case"], settings, torch.float64)
    close = [abs(a - b) <= _CLOSE for a, b in zip(again, kept["losses_in_float64"], strict=False)]
    return len(again) == len(kept["losses_in_float64"]) and all(close)  # a NaN is not close


def losses_of(
    experiment: Trained, case: dict[str, Any], settings: Settings, dtype: torch.dtype
) -> list[float]:
    """Return the losses of the first steps of a case in ``dtype``, with one thread, as its rows are."""
    former = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # initial weights are drawn in it, too
    try:
        with pytorch_threads(1), concentration_ignored():
            return experiment.first_losses(case, settings, STEPS)
    finally:
        torch.set_default_dtype(former)


class _EnoughError(Exception):
    pass


def convert_inputs(model: nn.Module) -> None:
    """Make a model convert its inputs, which are float32, to the default dtype, in which it was made."""
    dtype = torch.get_default_dtype()
    model.register_forward_pre_hook(lambda _, inputs: tuple(values.to(dtype) for values in inputs))


def first_losses(run: Run, steps: int) -> list[float]:
    """Train a new ``run`` for ``steps`` steps, or to its end if that comes first.

    Returns:
        The loss of each step's batch, before the step.
    """
    convert_inputs(run.model)
    losses: list[float] = []

    def look(model: nn.Module, inputs: tuple[Tensor, ...], scores: Tensor) -> None:
        if model.training:
            losses.append(float(F.cross_entropy(scores.detach(), run.batch[1])))

    def count() -> None:
        if len(losses) == steps:
            raise _EnoughError

    hook = run.model.register_forward_hook(look)
    with hook, suppress(_EnoughError):
        while not run.done:
            run.train_epoch(count)
    return losses
