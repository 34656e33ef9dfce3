"""Rows for tests of tables and pictures: those in docs/results, and made-up ones."""

from __future__ import annotations

import csv
import random
from pathlib import Path

from sparseopt_kernels.lab.reproduce.experiment import Case, Experiment, Row
from sparseopt_kernels.lab.reproduce.results import parse_value

RESULTS = Path(__file__).parents[2] / "docs" / "results"
_DEFAULTS = {str: "ok", int: 1, bool: False}
_BEST_RATE = 0.1


def committed(experiment: Experiment) -> list[Row]:
    """The rows in docs/results; none if they are of before a column by which cases are told apart. The file
    may be of before another column was added, if that is neither drawn nor tabulated."""
    path, columns = RESULTS / f"{experiment.name}.csv", experiment.columns
    if not path.exists():
        return []
    with path.open() as file:
        reader = csv.DictReader(file)
        if not set(experiment.key) <= set(reader.fieldnames or ()):
            return []
        return [
            {column: parse_value(text, columns[column]) for column, text in row.items() if column in columns}
            for row in reader
        ]


def made_up(experiment: Experiment) -> list[Row]:
    """A row of each case, with random numbers that are the same each time; searches find a rate of 0.1."""

    def row(case: Case) -> Row:
        numbers = random.Random(str(case))
        values = {
            name: _DEFAULTS[kind] if kind in _DEFAULTS else numbers.uniform(0.79, 0.81)
            for name, kind in experiment.columns.items()
        }
        if "held_out_accuracy" in values:
            values["held_out_accuracy"] -= 0.5 * (case["lr"] != _BEST_RATE)
            values["dead_share"] = numbers.uniform(0.0, 0.4)
        return {**values, **case}

    rows: dict[tuple[object, ...], Row] = {}
    while missing := [
        case for case in experiment.cases(list(rows.values())) if (*case.values(),) not in rows
    ]:
        rows.update({(*case.values(),): row(case) for case in missing})
    return list(rows.values())
