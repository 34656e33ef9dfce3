"""The command ``reproduce``: its options, and what it says."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..atomic import write_atomically
from ..training.errors import TrainingError, check_packages
from .catalogue import EXPERIMENTS
from .experiment import Case, Experiment, Row, Settings
from .results import Results
from .runner import measure_all

if TYPE_CHECKING:
    # What add_subparsers() returns has no public name.
    from argparse import _SubParsersAction

_OUTPUT = Path("runs") / "reproduce"
_EPILOG = """\
An experiment writes NAME.csv and NAME.png into the output folder and prints a table. Rows that are in the
CSV file are not measured again: after Ctrl-C, a kill or a full disk, the same command goes on. To measure
anew, name another folder with --output. Do not run an experiment twice at a time in one folder.
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
        experiment = _experiment(args.name)
        check_packages("reproduce")
        return _reproduce(experiment, args)
    except TrainingError as error:
        print(f"sparseopt reproduce: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped: the same command goes on where it was", file=sys.stderr)
        return 130


def _listed() -> list[str]:
    width = max(map(len, EXPERIMENTS), default=0)
    lines = []
    for name, e in EXPERIMENTS.items():
        lines.append(
            f"{name:{width}}  {e.source}; about {_duration(_seconds(e, e.cases([])))} with one process"
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


def _reproduce(experiment: Experiment, args: argparse.Namespace) -> int:
    settings = Settings(args.data_dir)
    results = _open_results(experiment, args.output)
    if not args.quiet:
        print(_announcement(experiment, results, args.workers), file=sys.stderr)
    if results.missing():
        experiment.check(settings)
        results.save()  # a folder that cannot be written to is found out now, not after the first case
        _measure(results, settings, args)
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


def _open_results(experiment: Experiment, folder: Path) -> Results:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"cannot make the output folder: {error}") from error
    return Results(experiment, folder / f"{experiment.name}.csv")


def _measure(results: Results, settings: Settings, args: argparse.Namespace) -> None:
    """Measure what is missing, with a progress bar that counts seconds of one process."""
    from tqdm import tqdm

    experiment = results.experiment

    def on_case(case: Case) -> None:
        # Cases that were not known of before may have come up.
        bar.total = bar.n + experiment.seconds(case) + _seconds(experiment, results.missing())
        bar.update(experiment.seconds(case))

    with tqdm(
        total=_seconds(experiment, results.missing()),
        disable=args.quiet or not sys.stderr.isatty(),
        bar_format="{l_bar}{bar}| {elapsed}<{remaining}",
        leave=False,
    ) as bar:
        measure_all(results, settings, args.workers, on_case)


def _announcement(experiment: Experiment, results: Results, workers: int) -> str:
    missing = results.missing()
    if not missing:
        return f"{experiment.name}: all of it is in {results.path} already, nothing is measured"
    workers = min(workers, len(missing))
    there = f"; {len(results.rows())} rows are there already" if results.rows() else ""
    return (
        f"{experiment.name} ({experiment.source}): {_counted(len(missing), 'case')}, about "
        f"{_duration(_seconds(experiment, missing) / workers)} with {_counted(workers, 'process')}{there}"
    )


def _seconds(experiment: Experiment, cases: Sequence[Case]) -> float:
    """With one process."""
    return sum(map(experiment.seconds, cases))


def _counted(number: int, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"


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
