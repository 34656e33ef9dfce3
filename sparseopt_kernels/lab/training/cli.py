"""The command ``train``: its options, its folders, and its final report."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import distributed
from .checkpoint import Checkpoint, load_checkpoint
from .config import OPTIONS, Config, new_config, saved_config
from .data import Data, open_dataset
from .errors import TrainingError, check_packages
from .experiment import CONFIG, RESULTS, WEIGHTS, Experiment
from .folders import RUNS, claim, claim_default, default_folders
from .options import CHECKPOINT_NAME, add_experiment, add_machine, add_training
from .report import table
from .sharded_checkpoint import shards_folder
from .stopped_ranks import told_when_stopped

if TYPE_CHECKING:
    # What add_subparsers() returns has no public name.
    from argparse import _SubParsersAction

    from .watch import ProgressBar

_PICTURE = "curves.png"

_EPILOG = """\
Without options: an MLP on scikit-learn's digits, 95% sparse (ERK), RigL, trained by masked SGD and by
SparseOpt from five seeds each. The runs of one seed share initial weights, masks and order of examples.

The output folder gets results.csv (a line per optimizer, seed and epoch), curves.png, config.json, and
the trained weights and masks of each run. Results are never overwritten: the default folder gets a number
if it exists, and a folder named by --output must not have results in it yet.

Ctrl-C keeps the epochs that are finished. An experiment that was started with --checkpoint and stopped in
any way can be continued, to the same weights, masks and numbers, by
    python -m sparseopt_kernels train --resume FOLDER

Several processes, each with its part of every batch:
    torchrun --nproc-per-node 2 -m sparseopt_kernels train --checkpoint
Options and results are the same; the folder must be one that all ranks see. Another number of ranks can
continue, too.
"""


def add_parser(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add ``train`` to what ``ArgumentParser.add_subparsers()`` returned; ``args.run(args)`` runs it."""
    parser = subparsers.add_parser(
        "train",
        help="train sparse networks and compare optimizers",
        description="Train a sparse network with several optimizers and seeds, and compare them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # Options that are not given are absent from args, so that --resume can tell them from defaults.
        argument_default=argparse.SUPPRESS,
    )
    add_experiment(parser.add_argument_group("experiment"))
    add_training(parser.add_argument_group("training"))
    add_machine(parser.add_argument_group("machine and files"))
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run ``train`` with parsed arguments, print the results or the error, and return the exit code."""
    try:
        check_packages("train")
        return _run(args)
    except TrainingError as error:
        print(f"sparseopt train: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:  # before the first step, or a second time
        print("sparseopt train: stopped", file=sys.stderr)
        return 130


def _run(args: argparse.Namespace) -> int:
    saved = _saved(args) if hasattr(args, "resume") else None
    if saved is None:
        config = new_config(_given(args))
    else:
        config = saved_config(saved.checkpoint.config, _given(args), saved.file)
    with distributed.joined(config.device):
        experiment = _started(config, args) if saved is None else _resumed(config, saved, args)
        return _train(experiment, quiet=hasattr(args, "quiet") or distributed.rank() != 0)


def _train(experiment: Experiment, *, quiet: bool) -> int:
    from .plots import curves_png
    from .watch import ProgressBar

    config, progress = experiment.config, experiment.progress
    bar = ProgressBar(config, len(progress.finished), quiet=quiet)
    interrupted = False
    try:
        with told_when_stopped(lambda: _how_to_go_on(experiment)):
            _train_all(experiment, bar)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        bar.close()

    def report() -> None:
        if progress.rows:
            experiment.write(_PICTURE, curves_png(progress, config))
            print(table(progress.rows, config, experiment.dataset.test_size))
        print(_files(experiment.output))
        if interrupted:
            print(f"stopped: {len(progress.rows)} epochs are kept. {_how_to_go_on(experiment)}")
        sys.stdout.flush()

    if interrupted:  # each rank somewhere else
        if distributed.rank() == 0:
            report()
        return 130
    distributed.from_first(report)  # all wait for it: torchrun stops the others when one ends with an error
    ends = [row for row in progress.rows if row.epoch == config.epochs or row.status == "diverged"]
    return 1 if all(row.status == "diverged" for row in ends) else 0


def _train_all(experiment: Experiment, bar: ProgressBar) -> None:
    try:
        experiment.train(bar)
    except TrainingError as error:
        raise TrainingError(f"{error}\n{_how_to_go_on(experiment)}", error.exit_code) from error


def _started(config: Config, args: argparse.Namespace) -> Experiment:
    """Return a new experiment in a folder of its own."""
    dataset = _dataset(config)
    output, checkpoint = distributed.from_first(partial(_claimed, config, args))
    return Experiment(config, dataset, output, checkpoint)


def _dataset(config: Config) -> Data:
    """Return the data set. Rank 0 opens it first: it may have to download it."""

    def open_it() -> Data:
        return open_dataset(config.data, config.data_dir, config.loader_workers)

    opened: list[Data] = []  # on rank 0
    distributed.from_first(lambda: opened.append(open_it()))
    return opened[0] if opened else open_it()


def _claimed(config: Config, args: argparse.Namespace) -> tuple[Path, Path | None]:
    """Return the output folder and the checkpoint file of a new experiment; the folder is made here."""
    checkpoint: Path | None = getattr(args, "checkpoint", None)
    for former in [] if checkpoint is None else [checkpoint, shards_folder(checkpoint)]:
        if former.exists():
            raise TrainingError(
                f"--checkpoint {checkpoint}: {former} exists. Continue it with --resume {checkpoint}, or "
                "name another"
            )
    try:
        output = claim(args.output) if hasattr(args, "output") else claim_default(config.name)
        if hasattr(args, "checkpoint"):
            checkpoint = checkpoint or output / CHECKPOINT_NAME
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"cannot make the output folder: {error}") from error
    return output, checkpoint


class _Saved(NamedTuple):
    file: Path
    checkpoint: Checkpoint


def _saved(args: argparse.Namespace) -> _Saved:
    """Return the checkpoint that is to be continued."""
    file = _file_to_resume(args)
    if getattr(args, "checkpoint", None) not in (None, file):
        raise TrainingError(
            f"--checkpoint {args.checkpoint} and --resume {file} are different files: name one"
        )
    return _Saved(file, load_checkpoint(file))


def _resumed(config: Config, saved: _Saved, args: argparse.Namespace) -> Experiment:
    """Return the experiment of a checkpoint, in its folder."""
    former_output = saved.file.parent / saved.checkpoint.output
    output: Path = getattr(args, "output", former_output)

    def claimed() -> None:
        try:
            if output.resolve() != former_output.resolve():
                claim(output)
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"cannot make the output folder: {error}") from error

    dataset = _dataset(config)
    distributed.from_first(claimed)
    return Experiment(config, dataset, output, saved.file, saved.checkpoint.progress)


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of the experiment that are on the command line."""
    values = {name: getattr(args, name) for name in OPTIONS if hasattr(args, name)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _file_to_resume(args: argparse.Namespace) -> Path:
    path: Path | None = args.resume or getattr(args, "checkpoint", None) or getattr(args, "output", None)
    if path is None:
        name = new_config(_given(args)).name
        started = [folder for folder in default_folders(name) if (folder / CHECKPOINT_NAME).exists()]
        if not started:
            raise TrainingError(f"there is no checkpoint in {RUNS / name}: name the folder, --resume FOLDER")
        path = started[-1]
    return path if path.is_file() else path / CHECKPOINT_NAME


def _files(output: Path) -> str:
    found = {
        "picture": output / _PICTURE,
        "numbers": output / RESULTS,
        "options": output / CONFIG,
        "weights": output / WEIGHTS,
    }
    return "\n".join(f"{name}: {path}" for name, path in found.items() if path.exists())


def _how_to_go_on(experiment: Experiment) -> str:
    if experiment.checkpoint is None:
        return "To be able to continue after a stop, start with --checkpoint."
    path = experiment.checkpoint
    if path == experiment.output / CHECKPOINT_NAME:
        path = experiment.output
    command = f"-m sparseopt_kernels train --resume {shlex.quote(str(path))}"
    if not distributed.launched():
        return f"Continue with: python {command}"
    try:
        note = _last_complete(experiment.checkpoint)
    except TrainingError:  # it has not come to that yet
        return "There is no checkpoint yet."
    return f"{note}Continue with: torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']} {command}"


def _last_complete(checkpoint: Path) -> str:
    """Return a sentence on what a checkpoint file has.

    Raises:
        TrainingError: there is none yet, or it cannot be read.
    """
    rows = load_checkpoint(checkpoint).progress.rows
    end = f"{rows[-1].optimizer} seed {rows[-1].seed}, epoch {rows[-1].epoch}" if rows else "no epoch yet"
    return f"The last complete checkpoint is {checkpoint} ({end}); any number of ranks can continue it. "
