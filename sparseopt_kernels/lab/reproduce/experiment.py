"""What an experiment of the paper is: cases to be measured one by one, a table and a picture of the results.

How cases are run is in ``runner.py``, how they are kept and resumed in ``results.py``; each experiment has a
file of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from ..training.config import AMP

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
"""A line of the CSV file, by column."""
Case = dict[str, Any]
"""The columns that tell one measurement from all others, and their values."""


class Settings(NamedTuple):
    """What the user decides of a machine. No result depends on it, but for the data of an experiment that
    says in its column ``data`` what they were."""

    data_dir: str | None = None
    """Where the files of the data set are; None: where the package finds or downloads them."""
    device: str = "cpu"
    """This and what follows is for experiments of the paper's own size, ``PaperSized``."""
    amp: AMP = "none"
    channels_last: bool = False
    loader_workers: int = 0
    """Processes that decode images."""
    checkpoints: Path | None = None
    """A folder in which cases may keep how far they are."""
    progress: bool = False
    """Whether cases say on standard error how far they are."""

    def checkpoint(self, case: Case) -> Path | None:
        """The file of a case; it is removed when the case is in the results."""
        if self.checkpoints is None:
            return None
        return self.checkpoints / ("-".join(f"{name}_{value}" for name, value in case.items()) + ".pt")


class Experiment(Protocol):
    """An experiment is an object that is pickled into other processes: it holds nothing but its settings."""

    @property
    def name(self) -> str:
        """As the command and the files are called: ``figure2``."""

    @property
    def source(self) -> str:
        """Where the paper has it: ``Figure 2, Sections 3.2 and E.3``."""

    @property
    def shows(self) -> str:
        """What it shows, in a line."""

    @property
    def columns(self) -> Mapping[str, type]:
        """The columns of the CSV file, and the types of their values: exactly str, int, float or bool.

        A column ``data``, the name of the data set, must be the same in all rows of a file.
        """

    @property
    def key(self) -> Sequence[str]:
        """The columns of a ``Case``. A NaN is no value for them: it does not equal itself."""

    def cases(self, rows: Sequence[Row]) -> list[Case]:
        """What is to be measured, in this order.

        Args:
            rows: what has been measured so far, in any order, of any cases. Cases may depend on it (seeds
                at the learning rate that was best, say): they are asked for again until all of them are
                measured.
        """

    def seconds(self, case: Case) -> float:
        """About how long a case takes with one thread of a current processor."""

    def check(self, settings: Settings) -> None:
        """Raise ``TrainingError`` if something is missing (data, say), before anything is measured."""

    def measure(self, case: Case, settings: Settings) -> list[Row]:
        """One or several rows; each has the columns of the case. Called with one thread."""

    def table(self, rows: Sequence[Row]) -> list[str]:
        """The result in a few lines, with the paper's own figures beside where there are any."""

    def draw(self, rows: Sequence[Row], figure: Figure) -> None:
        """The picture, on an empty figure whose size may be set."""


@runtime_checkable
class PaperSized(Experiment, Protocol):
    """An experiment that takes days on a GPU. Under torchrun, all ranks measure a case together."""

    def cost(self, cases: Sequence[Case]) -> str:
        """How long the cases take, on what assumptions, and how a part of them is asked for."""


@runtime_checkable
class Trained(Experiment, Protocol):
    """An experiment that trains networks, so that its rows go stale when the code changes.

    Its CSV file has one more column, ``commit``, of the code that made the row: ``Results`` adds it, so that
    neither ``columns`` nor what ``measure`` returns has it. The losses of the first steps of one case are
    kept beside that file (``first_steps.py``).
    """

    def kept_case(self) -> Case:
        """A case that uses as much as one can of what the experiment compares."""

    def first_losses(self, case: Case, settings: Settings, steps: int) -> list[float]:
        """The losses of the first steps of a case, fewer if it has fewer steps."""
