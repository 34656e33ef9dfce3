"""The command ``reproduce``: its options, files and messages."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..atomic import write_atomically
from ..training import distributed
from ..training.config import Config, check_device, default_parallel, option
from ..training.errors import TrainingError, check_packages
from ..training.options import add_speed
from ..training.sharded_checkpoint import remove_others
from ..training.stopped_ranks import told_when_stopped
from .catalogue import EXPERIMENTS
from .experiment import Case, Experiment, PaperSized, Row, Settings, Trained
from .first_steps import check_or_write_first_steps
from .results import Results, parse_value
from .runner import measure_all

if TYPE_CHECKING:
    # What add_subparsers() returns has no public name.
    from argparse import _SubParsersAction

_OUTPUT = Path("runs") / "reproduce"
_OF_PAPER_SIZED = ("device", "parallel", "amp", "channels_last", "loader_workers")
_EPILOG = """\
An experiment writes NAME.csv and NAME.png into the output folder and prints a table; one that trains
networks names in each row the commit of the code, and keeps the losses of the first steps of one case. Rows
that are in the CSV file are not measured again: after Ctrl-C, a kill or a full disk, the same command
continues. To measure everything again, name another folder with --output. Do not run an experiment twice at
the same time in one folder.
"""


def add_parser(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add ``reproduce`` to what ``ArgumentParser.add_subparsers()`` returned; ``args.run(args)`` runs it."""
    parser = subparsers.add_parser(
        "reproduce",
        help="run the experiments of the paper",
        description="Run an experiment of the SparseOpt paper, at a size that a laptop can do.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="the experiment; --list shows all of them")
    parser.add_argument("--list", action="store_true", help="list the experiments and how long they take")
    parser.add_argument(
        "--output",
        type=Path,
        default=_OUTPUT,
        metavar="DIR",
        help=f"folder for the results (default: {_OUTPUT})",
    )
    parser.add_argument("--data-dir", metavar="DIR", help="folder with the files of the data set")
    parser.add_argument(
        "--workers",
        type=_at_least_1,
        metavar="N",
        help="number of processes, each of one thread (default: the number of processors; 1 on a GPU)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        action="extend",
        default=[],
        metavar="COLUMN=VALUE",
        help="measure only the cases with these values, written as in the CSV file; if a column is named "
        "twice, cases with either value",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar, print the table only")
    tables = parser.add_argument_group("the paper's tables (table1 to table9), also under torchrun")
    tables.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    add_speed(tables)
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run ``reproduce`` with parsed arguments and return the exit code."""
    try:
        if args.list:
            print("\n".join(_listed()))
            return 0
        experiment = _experiment(args.name)
        check_packages("reproduce")
        settings = _settings(experiment, args)
        with distributed.joined(settings.device):
            return _reproduce(experiment, settings, args)
    except TrainingError as error:
        print(f"sparseopt reproduce: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped: run the same command again to continue", file=sys.stderr)
        return 130


def _listed() -> list[str]:
    width = max(map(len, EXPERIMENTS), default=0)
    lines = []
    for name, e in EXPERIMENTS.items():
        duration = f"about {_duration(_seconds(e, e.cases([])))} with one process"
        lines.append(
            f"{name:{width}}  {e.source}; {'days on GPUs' if isinstance(e, PaperSized) else duration}"
        )
        lines.append(f"{'':{width}}  {e.shows}")
    return lines


def _experiment(name: str | None) -> Experiment:
    known = ", ".join(EXPERIMENTS)
    if name is None:
        raise TrainingError(f"NAME is missing, it must be one of {known} (see --list)")
    if name not in EXPERIMENTS:
        raise TrainingError(f"NAME is {name!r}, it must be one of {known} (see --list)")
    return EXPERIMENTS[name]


def _settings(experiment: Experiment, args: argparse.Namespace) -> Settings:
    options = {name: getattr(args, name) for name in _OF_PAPER_SIZED}
    given = {name: value for name, value in options.items() if value is not None and value is not False}
    if not isinstance(experiment, PaperSized):
        if given:
            raise TrainingError(f"{option(next(iter(given)))} is for the tables, not for {experiment.name}")
        if distributed.launched():
            raise TrainingError(f"{experiment.name} does not run under torchrun: start it without")
        return Settings(data_dir=args.data_dir)
    values: dict[str, Any] = {
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "parallel": default_parallel(),
        "loader_workers": Config.loader_workers,
        **given,
    }
    check_device(values["device"], Config.backend)
    checkpoints = args.output / f"{experiment.name}-checkpoints"
    return Settings(data_dir=args.data_dir, **values, checkpoints=checkpoints, progress=not args.quiet)


def _workers(settings: Settings, args: argparse.Namespace) -> int:
    one = distributed.launched() or settings.device.startswith("cuda")
    if distributed.launched() and args.workers not in (None, 1):
        raise TrainingError(
            f"--workers is {args.workers}, under torchrun it must be 1: ranks share each case"
        )
    workers: int = args.workers or (1 if one else os.cpu_count() or 1)
    return workers


def _only(experiment: Experiment, texts: Sequence[str]) -> dict[str, list[object]]:
    """Parse ``["seed=0", "seed=1"]`` to ``{"seed": [0, 1]}``."""
    only: dict[str, list[object]] = {}
    for text in texts:
        column, equals, value = text.partition("=")
        if not equals or column not in experiment.key:
            columns = ", ".join(experiment.key)
            raise TrainingError(
                f"--only has {text!r}, it must be COLUMN=VALUE with a column out of {columns}"
            )
        try:
            only.setdefault(column, []).append(parse_value(value, experiment.columns[column]))
        except ValueError as error:
            raise TrainingError(f"--only has {text!r}: {error}") from error
    return only


def _reproduce(experiment: Experiment, settings: Settings, args: argparse.Namespace) -> int:
    workers = _workers(settings, args)
    is_first = distributed.rank() == 0
    results = _open_results(experiment, args.output, _only(experiment, args.only))
    if not results.missing() and not results.rows():
        raise TrainingError(f"--only {' '.join(args.only)} leaves no case of {experiment.name}")
    if not args.quiet and is_first:
        print(_announcement(experiment, results, workers), file=sys.stderr)
    if results.missing():
        experiment.check(settings)
        results.save()  # so that an unwritable folder raises now and not after the first case
        if isinstance(experiment, Trained):
            check_or_write_first_steps(experiment, settings, results)
        _measure(results, settings, workers, show=is_first and not args.quiet)
    if not is_first:
        return 0
    rows = results.rows()
    picture = results.path.with_suffix(".png")
    try:
        write_atomically(picture, _png(experiment, rows))
    except OSError as error:
        raise TrainingError(f"cannot write {picture}: {error}", exit_code=1) from error
    print("\n".join(experiment.table(rows)))
    if not args.quiet:
        print(f"numbers: {results.path}\npicture: {picture}")
    return 0


def _open_results(experiment: Experiment, folder: Path, only: Mapping[str, Sequence[object]]) -> Results:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"cannot make the output folder: {error}") from error
    return Results(experiment, folder / f"{experiment.name}.csv", only)


def _measure(results: Results, settings: Settings, workers: int, *, show: bool) -> None:
    """Measure the missing cases, with a progress bar that counts seconds of one process."""
    from tqdm import tqdm

    experiment = results.experiment

    def on_case(case: Case) -> None:
        # The results may have added cases.
        bar.total = bar.n + experiment.seconds(case) + _seconds(experiment, results.missing())
        bar.update(experiment.seconds(case))
        checkpoint = settings.checkpoint(case)
        if checkpoint is not None and distributed.rank() == 0:
            checkpoint.unlink(missing_ok=True)
            remove_others(checkpoint)

    with (
        told_when_stopped(lambda: _how_to_go_on(results, settings)),
        tqdm(
            total=_seconds(experiment, results.missing()),
            disable=not (show and sys.stderr.isatty()),
            bar_format="{l_bar}{bar}| {elapsed}<{remaining}",
            leave=False,
        ) as bar,
    ):
        measure_all(results, settings, workers, on_case)


def _how_to_go_on(results: Results, settings: Settings) -> str:
    """Return what is said when another rank has died."""
    file = settings.checkpoint(results.missing()[0])
    again = "Run the same command again to continue, with any number of ranks."
    return f"The last complete checkpoint is {file}. {again}" if file and file.exists() else again


def _announcement(experiment: Experiment, results: Results, workers: int) -> str:
    missing = results.missing()
    if not missing:
        return f"{experiment.name}: all rows are in {results.path} already, nothing is measured"
    there = f"; {len(results.rows())} rows are in the file already" if results.rows() else ""
    cases = f"{experiment.name} ({experiment.source}): {_counted(len(missing), 'case')}"
    if isinstance(experiment, PaperSized):
        return f"{cases}{there}, {experiment.cost(missing)}"
    workers = min(workers, len(missing))
    duration = _duration(_seconds(experiment, missing) / workers)
    return f"{cases}, about {duration} with {_counted(workers, 'process')}{there}"


def _seconds(experiment: Experiment, cases: Sequence[Case]) -> float:
    """Return the estimated seconds of the cases with one process."""
    return sum(map(experiment.seconds, cases))


def _counted(number: int, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.0f} days"


def _png(experiment: Experiment, rows: list[Row]) -> bytes:
    from ..training.plots import png

    return png(8, 4.5, lambda figure: experiment.draw(rows, figure))


def _at_least_1(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)
