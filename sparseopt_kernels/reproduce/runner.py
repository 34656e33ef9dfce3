"""Measures the cases of an experiment in several processes, and keeps each on the disk at once.

The CSV file is the only state: what it has is not measured again, so an experiment that was stopped in any
way goes on where it was.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch

from ..atomic import write_atomically
from ..training import distributed
from ..training.errors import TrainingError
from .experiment import Case, Experiment, Row, Settings

_Key = tuple[object, ...]


class Results:
    """The rows of an experiment in its CSV file.

    Args:
        experiment: whose rows.
        path: of the file.
        only: the values, by column, that cases have to be measured; columns that are not in it may have any.

    Raises:
        TrainingError: the file is there and is not one of this experiment.
    """

    def __init__(
        self, experiment: Experiment, path: Path, only: Mapping[str, Sequence[object]] | None = None
    ) -> None:
        self.experiment = experiment
        self.path = path
        self._only = only or {}
        self._rows: dict[_Key, list[Row]] = {}
        if path.exists():
            for row in self._read():
                self._rows.setdefault(self._key(row), []).append(row)

    def rows(self) -> list[Row]:
        """All rows, in the order of the cases, whatever the order in which they were measured."""
        every = [row for rows in self._rows.values() for row in rows]
        order = [self._key(case) for case in self.experiment.cases(every)]
        return [row for key in order for row in self._rows.get(key, [])]

    def missing(self) -> list[Case]:
        """The cases that are asked for, are known of by now and were not measured."""
        every = [row for rows in self._rows.values() for row in rows]
        return [
            case
            for case in self.experiment.cases(every)
            if self._key(case) not in self._rows
            and all(case[column] in values for column, values in self._only.items())
        ]

    def add(self, case: Case, rows: list[Row]) -> None:
        """Keep a case: on the disk, too."""
        self._rows[self._key(case)] = rows
        if distributed.rank() != 0:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self.experiment.columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows())
        try:
            write_atomically(self.path, text.getvalue().encode())
        except OSError as error:
            raise TrainingError(f"cannot write {self.path}: {error}", exit_code=1) from error

    def _key(self, values: Row) -> _Key:
        return tuple(values[column] for column in self.experiment.key)

    def _read(self) -> list[Row]:
        columns = self.experiment.columns
        with self.path.open(newline="") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames is None or list(reader.fieldnames) != list(columns):
                raise TrainingError(
                    f"{self.path} has columns {reader.fieldnames}, {self.experiment.name} has "
                    f"{list(columns)}: name another folder with --output, or move the file away"
                )
            try:
                return [{name: parse_value(row[name], columns[name]) for name in columns} for row in reader]
            except (ValueError, TypeError) as error:
                raise TrainingError(
                    f"{self.path}, line {reader.line_num}: {error}. Mend or remove that line"
                ) from error


def measure_all(
    results: Results, settings: Settings, workers: int, on_case: Callable[[Case], object] = lambda case: None
) -> None:
    """Measure what is missing.

    Args:
        results: of the experiment; they are added to.
        workers: how many processes; with 1 it happens in this one.
        on_case: called after each case.
    """
    while cases := results.missing():
        for case, rows in _measured(results.experiment, cases, settings, workers):
            results.add(case, rows)
            on_case(case)


def _measured(
    experiment: Experiment, cases: Sequence[Case], settings: Settings, workers: int
) -> Iterator[tuple[Case, list[Row]]]:
    if workers == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for case in cases:
                yield case, experiment.measure(case, settings)
        finally:
            torch.set_num_threads(threads)
        return
    # Not forked: a process that has used threads cannot be copied safely.
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    )
    try:
        futures = {pool.submit(experiment.measure, case, settings): case for case in cases}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def parse_value(text: str, kind: type) -> object:
    """A value as it is in a CSV file; ``ValueError`` if it is not one of that type."""
    if kind is bool:
        if text not in ("True", "False"):
            raise ValueError(f"{text!r} must be True or False")
        return text == "True"
    return kind(text)
