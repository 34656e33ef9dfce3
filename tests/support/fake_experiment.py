"""An experiment that is quick, leaves a trace of each measurement, and goes wrong where it is told to."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch

from sparseopt_kernels.lab.reproduce.experiment import Case, Row, Settings
from sparseopt_kernels.lab.training.errors import TrainingError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOTE = 'a "note", with a comma'


@dataclass(frozen=True)
class Fake:
    """``count`` cases of two rows, and with ``final`` one more that depends on their rows."""

    trace: Path
    """A file to which each measurement adds its number."""
    count: int = 4
    final: bool = False
    trouble: Mapping[int, str] = field(default_factory=dict)
    """What happens in a case, by its number."""
    data: str = "made up"

    name: ClassVar[str] = "fake"
    source: ClassVar[str] = "Section 0"
    shows: ClassVar[str] = "what a frame does"
    columns: ClassVar[dict[str, type]] = {
        "number": int,
        "rate": float,
        "part": str,
        "even": bool,
        "data": str,
        "threads": int,
        "value": float,
    }
    key: ClassVar[tuple[str, ...]] = ("number", "rate")

    def cases(self, rows: Sequence[Row]) -> list[Case]:
        first = [{"number": number, "rate": 0.1} for number in range(self.count)]
        values = [row["value"] for row in rows if row["number"] < self.count]
        if not self.final or len(values) < 2 * self.count:
            return first
        return [*first, {"number": self.count, "rate": max(values)}]

    def seconds(self, case: Case) -> float:
        return 60.0

    def check(self, settings: Settings) -> None:
        if settings.data_dir == "nowhere":
            raise TrainingError("the data are nowhere")

    def measure(self, case: Case, settings: Settings) -> list[Row]:
        number = case["number"]
        with self.trace.open("a") as file:
            file.write(f"{number}\n")
        trouble = self.trouble.get(number, "")
        if trouble == "slow":
            time.sleep(5.0)  # longer than it takes to start another process on a busy machine
        elif trouble == "endless":
            time.sleep(600.0)
        elif trouble == "no rows":
            return []
        elif trouble == "missing data":
            raise TrainingError("data have gone")
        elif trouble == "bug":
            raise ZeroDivisionError("a bug")
        elif trouble == "interrupt":
            raise KeyboardInterrupt
        elif trouble == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        value = (number + 1) / 3
        row = {"even": number % 2 == 0, "data": self.data, "threads": torch.get_num_threads()}
        rows: list[Row] = [
            {**case, **row, "part": NOTE, "value": value},
            {**case, **row, "part": "", "value": -value},
        ]
        if trouble == "other case":
            rows[1]["number"] = 99
        elif trouble == "wrong type":
            rows[1]["value"] = 1
        elif trouble == "missing column":
            del rows[1]["value"]
        return rows

    def table(self, rows: Sequence[Row]) -> list[str]:
        return ["the table", f"{len(rows)} rows"]

    def draw(self, rows: Sequence[Row], figure: Figure) -> None:
        figure.subplots().plot([row["value"] for row in rows])

    def measured(self) -> list[int]:
        """The numbers of the cases that were begun, in this order."""
        return [int(line) for line in self.trace.read_text().split()] if self.trace.exists() else []
