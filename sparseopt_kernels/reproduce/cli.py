"""The command ``reproduce``: its options, and what it says."""

from __future__ import annotations

import argparse
import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..atomic import write_atomically
from ..text_table import aligned
from ..training.errors import TrainingError, check_packages
from .catalogue import EXPERIMENTS
from .experiment import Experiment, Row, Settings
from .runner import Results, measure_all

if TYPE_CHECKING:
    # What add_subparsers() returns has no public name.
    from argparse import _SubParsersAction

_OUTPUT = Path("runs") / "reproduce"
_EPILOG = """\
An experiment writes NAME.csv and NAME.png into the output folder and prints a table. Rows that are in the
CSV file are not measured again: after Ctrl-C, a kill or a full disk, the same command goes on.
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
    parser.add_argument("name", nargs="?", metavar="NAME", help="which experiment; --list names them")
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
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes, of one thread each (default: as many as there are processors)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar, the table only")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run ``reproduce`` with parsed arguments and return the exit code."""
    try:
        if args.list:
            print("\n".join(_listed()))
            return 0
        check_packages("reproduce")
        return _reproduce(_experiment(args.name), args)
    except TrainingError as error:
        print(f"sparseopt reproduce: error: {error}", file=sys.stderr)
        return error.exit_code


def _listed() -> list[str]:
    header = ("name", "of the paper", "one thread", "what it shows")
    rows = [
        (name, e.source, _duration(sum(map(e.seconds, e.cases([])))), e.shows)
        for name, e in EXPERIMENTS.items()
    ]
    return [line.rstrip() for line in aligned([header, *rows])]


def _experiment(name: str | None) -> Experiment:
    if name not in EXPERIMENTS:
        known = ", ".join(EXPERIMENTS)
        raise TrainingError(f"NAME is {name!r}, it must be one of {known} (see --list)")
    return EXPERIMENTS[name]


def _reproduce(experiment: Experiment, args: argparse.Namespace) -> int:
    from tqdm import tqdm

    settings = Settings(args.data_dir)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"cannot make the output folder: {error}") from error
    results = Results(experiment, args.output / f"{experiment.name}.csv")
    missing = results.missing()
    if missing:
        experiment.check(settings)
    if not args.quiet:
        print(_announcement(experiment, results, args.workers), file=sys.stderr)
    bar = tqdm(
        total=sum(map(experiment.seconds, missing)),
        disable=args.quiet or not sys.stderr.isatty(),
        bar_format="{l_bar}{bar}| {elapsed}<{remaining}",
        leave=False,
    )
    try:
        with bar:
            measure_all(results, settings, args.workers, lambda case: bar.update(experiment.seconds(case)))
    except KeyboardInterrupt:
        print(
            f"stopped with {len(results.missing())} cases to go: run the same command again to go on",
            file=sys.stderr,
        )
        return 130
    rows = results.rows()
    picture = results.path.with_suffix(".png")
    try:
        write_atomically(picture, _png(experiment, rows))
    except OSError as error:
        raise TrainingError(f"cannot write {picture}: {error}", exit_code=1) from error
    print("\n".join(experiment.table(rows)))
    print(f"numbers: {results.path}\npicture: {picture}")
    return 0


def _announcement(experiment: Experiment, results: Results, workers: int) -> str:
    missing = results.missing()
    if not missing:
        return f"{experiment.name}: all of it is in {results.path} already"
    seconds = sum(map(experiment.seconds, missing)) / min(workers, len(missing))
    there = f", {len(results.rows())} rows are there already" if results.rows() else ""
    return (
        f"{experiment.name} ({experiment.source}): {len(missing)} cases, about {_duration(seconds)} with "
        f"{workers} processes{there}"
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _png(experiment: Experiment, rows: list[Row]) -> bytes:
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from ..training.plots import STYLE

    # A figure of its own, without pyplot: no global state, no display.
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        experiment.draw(rows, figure)
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=130)
    return content.getvalue()


def _at_least_1(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)
