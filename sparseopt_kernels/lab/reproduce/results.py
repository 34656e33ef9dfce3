"""The results of an experiment in its CSV file, which is the only state.

Cases in the file are not measured again. ``runner.py`` measures the others.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ..atomic import write_atomically
from ..training import distributed
from ..training.errors import TrainingError
from .code_commit import code_commit
from .experiment import Case, Experiment, Row

_Key = tuple[object, ...]
_SAME_IN_ALL_ROWS = "data"
_COMMIT = "commit"


class Results:
    """The rows of an experiment in its CSV file.

    Args:
        experiment: the experiment.
        path: the CSV file. Under torchrun, only rank 0 writes it.
        only: values by column: only cases with one of them are measured. Other columns may have any value.

    Raises:
        TrainingError: the file exists, but cannot be read, belongs to another experiment, or is damaged.
    """

    def __init__(
        self, experiment: Experiment, path: Path, only: Mapping[str, Sequence[object]] | None = None
    ) -> None:
        self.experiment = experiment
        self.path = path
        self._commit = code_commit()  # now, because the code on disk may change while rows are measured
        self._columns = {**experiment.columns, _COMMIT: str}
        self._only = only or {}
        self._rows: dict[_Key, list[Row]] = {}
        if path.exists():
            for row in self._read():
                self._rows.setdefault(self._key(row), []).append(row)

    def rows(self) -> list[Row]:
        """Return the rows in the order of the cases, whatever the order in which they were measured."""
        return [row for case in self._cases() for row in self._rows.get(self._key(case), [])]

    def missing(self) -> list[Case]:
        """Return the cases that ``only`` selects and that are not measured, as far as they are known now."""
        return [
            case
            for case in self._cases()
            if self._key(case) not in self._rows
            and all(case[column] in values for column, values in self._only.items())
        ]

    def add(self, case: Case, rows: list[Row]) -> None:
        """Add the rows of a case and write the file.

        Raises:
            TrainingError: the rows are of other data than those in the file, or the file cannot be written.
            TypeError: the rows do not have the columns and types of the experiment or the values of the case.
        """
        self._check(case, rows)
        self._rows[self._key(case)] = [{**row, _COMMIT: self._commit} for row in rows]
        self.save()

    def save(self) -> None:
        """Write the file: rows in the order of the cases, then those of cases that do not exist now.

        Raises:
            TrainingError: it cannot be written. The former file is unchanged.
        """
        if distributed.rank() != 0:
            return
        # Rows without a case are kept: the case may come back when those that it depends on are measured.
        order = dict.fromkeys([self._key(case) for case in self._cases()] + list(self._rows))
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self._columns), lineterminator="\n")
        writer.writeheader()
        for key in order:
            writer.writerows(self._rows.get(key, []))
        try:
            write_atomically(self.path, text.getvalue().encode())
        except OSError as error:
            raise TrainingError(f"cannot write {self.path}: {error}", exit_code=1) from error

    def _cases(self) -> list[Case]:
        return self.experiment.cases([row for rows in self._rows.values() for row in rows])

    def _key(self, values: Row) -> _Key:
        return tuple(values[column] for column in self.experiment.key)

    def _check(self, case: Case, rows: list[Row]) -> None:
        name, columns = self.experiment.name, self.experiment.columns
        if not rows:
            raise TypeError(f"{name} measured no row for {case}")
        for row in rows:
            # Exactly these types, so that values read from the file equal those written.
            if row.keys() != columns.keys() or any(type(row[c]) is not columns[c] for c in columns):
                raise TypeError(f"{name} measured {row}, its columns are {dict(columns)}")
            if self._key(row) != self._key(case):
                raise TypeError(f"{name} measured {row} for {case}")
        there = next((row for group in self._rows.values() for row in group), rows[0])
        for row in (there, *rows):
            if row.get(_SAME_IN_ALL_ROWS) != rows[0].get(_SAME_IN_ALL_ROWS):
                raise TrainingError(
                    f"{self.path} has results from {there[_SAME_IN_ALL_ROWS]}, these are from "
                    f"{rows[0][_SAME_IN_ALL_ROWS]}: name another folder with --output"
                )

    def _read(self) -> list[Row]:
        try:
            lines = list(_lines(self.path.read_text(encoding="utf-8")))
        except (OSError, ValueError, csv.Error) as error:
            raise TrainingError(f"cannot read {self.path}: {error}") from error
        _, header = lines[0] if lines else (1, [])
        if header == list(self.experiment.columns):
            raise TrainingError(
                f"{self.path} has no column {_COMMIT}: it was written before rows named the code that made "
                "them. Name another folder with --output, or move the file away"
            )
        if header != list(self._columns):
            raise TrainingError(
                f"{self.path} has columns {', '.join(header) or 'none'}; {self.experiment.name} has "
                f"{', '.join(self._columns)}: name another folder with --output, or move the file away"
            )
        return [self._parse(number, line) for number, line in lines[1:]]

    def _parse(self, number: int, line: list[str]) -> Row:
        try:
            if len(line) != len(self._columns):
                raise ValueError(f"there are {len(line)} values, it must be {len(self._columns)}")
            return {
                name: parse_value(text, kind)
                for text, (name, kind) in zip(line, self._columns.items(), strict=True)
            }
        except ValueError as error:
            raise TrainingError(
                f"{self.path}, line {number}: {error}. Mend that line, or remove all lines with the same "
                f"{', '.join(self.experiment.key)}, which are measured again then"
            ) from error


def _lines(text: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the lines that are not empty, and the line number, from 1, at which each ends."""
    reader = csv.reader(io.StringIO(text), strict=True)
    for line in reader:
        if line:
            yield reader.line_num, line


def parse_value(text: str, kind: type) -> object:
    """Parse a value of a CSV file; raise ``ValueError`` if it is not of that type."""
    if kind is bool:
        if text not in ("True", "False"):
            raise ValueError(f"{text!r} must be True or False")
        return text == "True"
    return kind(text)
