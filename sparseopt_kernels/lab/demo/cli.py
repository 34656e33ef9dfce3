"""The command ``demo``: trains, times steps, and prints conclusions.

It trains by the code of the command ``train``. Steps are timed in ``step_time``, and the conclusions are in
``conclusions``.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..machine import machine
from ..training.concentration import concentration_ignored
from ..training.config import OPTIMIZERS, Config, new_config
from ..training.data import load_dataset
from ..training.errors import TrainingError, check_packages
from ..training.experiment import RESULTS, Experiment
from ..training.folders import claim, claim_default
from ..training.report import table
from .conclusions import agreement, remedy_conclusions, speed_conclusions, times_table, without_remedies
from .step_time import Size, StepTimes, measure

if TYPE_CHECKING:
    # What add_subparsers() returns has no public name.
    from argparse import _SubParsersAction

PICTURE, STEP_TIMES, WITHOUT = "demo.png", "step_times.csv", "without"
_EPOCHS = 30  # a minute for five seeds of three optimizers, and of two without clip and skipped step
_SPARSITY = 0.98  # at 0.95, accuracy on digits is the same without clip and skipped step

_EPILOG = """\
The demo trains an MLP on scikit-learn's digits, 98% sparse (ERK) with RigL, from five seeds, by three
optimizers:
  by-hand    masked SGD in plain PyTorch: mask the gradients, clip them, torch.optim.SGD, mask the weights
  sgd        SparseOpt(correction="none"), which computes the same in one pass over memory
  sparseopt  SparseOpt with the correction of the paper (Eq. 12)
All of them limit the norm of the gradient to 1, and leave out the step that follows an update of the masks.
What that is worth is seen from the latter two without it. Then the demo times steps on a wider MLP, with
gradients of the same data. The optimizers and PyTorch's fused SGD take turns.

The output folder gets demo.png, results.csv (a line per optimizer, seed and epoch), step_times.csv,
config.json, and the trained weights; its folder "without" has those of the runs without clip and skipped
step. Results are never overwritten: runs/demo gets a number if it exists, and a folder named by --output must
not have results in it yet.
"""


def add_parser(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``demo`` to what ``ArgumentParser.add_subparsers()`` returned; ``args.run(args)`` runs it."""
    parser = subparsers.add_parser(
        "demo",
        help="train a sparse network and time a step, with and without this package: a minute and a half",
        description="Train a sparse network with and without this package, and compare accuracy and "
        "step time.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder for the results (default: runs/demo)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar, print the results only")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run ``demo`` with parsed arguments and return the exit code."""
    try:
        check_packages("demo")
        config = new_config({"optimizer": OPTIMIZERS, "epochs": _EPOCHS, "sparsity": _SPARSITY})
        return demonstrate(config, Size(), args.output, quiet=args.quiet)
    except TrainingError as error:
        print(f"sparseopt demo: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("sparseopt demo: stopped", file=sys.stderr)
        return 130


def demonstrate(config: Config, size: Size, output: Path | None, *, quiet: bool) -> int:
    """Run the whole demo.

    Args:
        config: of the training; its optimizers are those of ``OPTIMIZERS``.
        size: of the network whose steps are timed.
        output: an output folder, or None for the next default one.
        quiet: no progress bar.

    Returns:
        The exit code: 1 if no run came to its end.

    Raises:
        TrainingError: the folder has results of another experiment, or a file cannot be written.
    """
    from ..training.watch import ProgressBar
    from .picture import demo_png

    dataset = load_dataset(config.data, config.data_dir)
    try:
        folder = claim_default("demo") if output is None else claim(output)
    except OSError as error:
        raise TrainingError(f"cannot make the output folder: {error}") from error
    (folder / WITHOUT).mkdir(exist_ok=True)
    experiment = Experiment(config, dataset, folder)
    without = Experiment(without_remedies(config), dataset, folder / WITHOUT)
    for own in (experiment, without):
        bar = ProgressBar(own.config, 0, quiet=quiet)
        if own is without and not quiet:
            print("the same without clip and skipped step", file=sys.stderr)
        try:
            with concentration_ignored():
                own.train(bar)
        finally:
            bar.close()
    if not quiet:
        print(f"timing steps, at most {size.seconds:.0f} seconds", file=sys.stderr)
    measured = measure(dataset.to(torch.device(config.device)), size)

    rows, former, test_examples = experiment.progress.rows, without.progress.rows, len(dataset.test_labels)
    experiment.write(STEP_TIMES, _csv(measured).encode())
    experiment.write(PICTURE, demo_png(experiment.progress, former, config, measured, test_examples))
    accuracies = [
        table(rows, config, test_examples),
        "(by-hand: masked SGD in plain PyTorch; sgd: SparseOpt without correction; sparseopt: with Eq. 12)",
        "",
        "The same without a clip (max_grad_norm=1) and without the skipped step:",
        table(former, without.config, test_examples),
        *remedy_conclusions(rows, former, without.config, test_examples),
    ]
    print("\n".join(_report(accuracies, measured)))
    for kind, name in (("picture", PICTURE), ("numbers", RESULTS), ("times", STEP_TIMES)):
        print(f"{kind}: {folder / name}")
    return 0 if any(row.epoch == config.epochs and row.status == "ok" for row in rows) else 1


def _report(accuracies: list[str], measured: StepTimes) -> list[str]:
    return [
        "Accuracy: the same network, data and masks, trained in three ways",
        *accuracies,
        "",
        f"Speed: a step on {measured.weights / 1e6:.2f} million weights, {measured.sparsity:.1%} sparse, on "
        f"{machine()}, {measured.threads} threads",
        *times_table(measured),
        *speed_conclusions(measured),
        agreement(measured),
        "",
    ]


def _csv(measured: StepTimes) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    values = {key: value for key, value in asdict(measured).items() if key not in ("times", "wrong")}
    writer.writerow(["contestant", "p20_ms", "p50_ms", "p80_ms", "rounds", "machine", *values])
    for name, t in measured.times.items():
        times = [f"{ms:.4f}" for ms in (t.p20_ms, t.p50_ms, t.p80_ms)]
        writer.writerow([name, *times, t.rounds, machine(), *values.values()])
    return text.getvalue()
