"""The interface of experiments: cases that are measured one by one, a table and a picture of the results.

``runner.py`` runs the cases, ``results.py`` keeps their rows; each experiment has a file of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from ..training.config import AMP, Parallel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
"""A line of the CSV file: values by column."""
Case = dict[str, Any]
"""The columns that identify one measurement, and their values."""


class Settings(NamedTuple):
    """The machine and the data folder that the user chooses. Results depend on the data alone, and an
    experiment that takes other data has a column ``data`` that names them."""

    data_dir: str | None = None
    """The folder of the data set's files; None: where the package finds or downloads them."""
    device: str = "cpu"
    """A torch device. This field and those after it are for ``PaperSized`` experiments."""
    parallel: Parallel = "none"
    amp: AMP = "none"
    channels_last: bool = False
    loader_workers: int = 0
    """The number of processes that decode images."""
    checkpoints: Path | None = None
    """The folder for the checkpoints of cases; None: no checkpoints."""
    progress: bool = False
    """True if cases print their progress on standard error."""

    def checkpoint(self, case: Case) -> Path | None:
        """Return the checkpoint file of a case, which is removed when the case is in the results."""
        if self.checkpoints is None:
            return None
        return self.checkpoints / ("-".join(f"{name}_{value}" for name, value in case.items()) + ".pt")


class Experiment(Protocol):
    """An experiment. It is pickled into other processes, so it holds nothing but its settings."""

    @property
    def name(self) -> str:
        """The name in the command and in file names: ``figure2``."""

    @property
    def source(self) -> str:
        """The place in the paper: ``Figure 2, Sections 3.2 and E.3``."""

    @property
    def shows(self) -> str:
        """A line on the subject of the experiment."""

    @property
    def columns(self) -> Mapping[str, type]:
        """The columns of the CSV file, and the types of their values: exactly str, int, float or bool.

        A column ``data``, the name of the data set, must be the same in all rows of a file. ``Results`` adds
        the column ``commit``, of the code that made the row: rows of ``measure`` do not have it.
        """

    @property
    def key(self) -> Sequence[str]:
        """The columns of a ``Case``. Their values must not be NaN, which does not equal itself."""

    def cases(self, rows: Sequence[Row]) -> list[Case]:
        """Return the cases to be measured, in this order.

        Args:
            rows: all rows measured so far, in any order. Cases may depend on them (seeds at the best learning
                rate, say): this is called again until all cases are measured.
        """

    def seconds(self, case: Case) -> float:
        """Return the approximate seconds of a case with one thread of a current processor."""

    def check(self, settings: Settings) -> None:
        """Raise ``TrainingError`` if something is missing (data, say). Called before anything is measured."""

    def measure(self, case: Case, settings: Settings) -> list[Row]:
        """Measure a case with one thread; return one or more rows, which include the case's columns."""

    def table(self, rows: Sequence[Row]) -> list[str]:
        """Return the results as lines of text, beside the paper's own figures where there are any."""

    def draw(self, rows: Sequence[Row], figure: Figure) -> None:
        """Draw the picture on an empty figure, whose size may be changed."""


@runtime_checkable
class PaperSized(Experiment, Protocol):
    """An experiment that takes days on a GPU. Under torchrun, all ranks measure a case together."""

    def cost(self, cases: Sequence[Case]) -> str:
        """Return text on the time that the cases take, its assumptions, and the options to measure fewer."""


@runtime_checkable
class Trained(Experiment, Protocol):
    """An experiment that trains networks at a laptop's size.

    The losses of the first steps of one case are kept beside its CSV file (``first_steps.py``). They tell if
    the code still trains as it did for the rows.
    """

    def kept_case(self) -> Case:
        """Return the case whose first losses are kept: one that uses as many of the compared features as
        possible."""

    def first_losses(self, case: Case, settings: Settings, steps: int) -> list[float]:
        """Return the losses of the first ``steps`` steps of a case, or of all if it has fewer, computed in
        PyTorch's default dtype. Its masks are updated every ``first_steps.UPDATE_EVERY`` steps, whatever the
        case says."""
