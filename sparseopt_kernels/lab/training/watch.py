"""The progress of an experiment on standard error: a bar on a terminal, and a line for each finished run."""

from __future__ import annotations

import sys

from .config import Config
from .run import Row, Run


class ProgressBar:
    """A progress bar over all runs, on standard error, and a line per finished run.

    Args:
        config: the configuration of the experiment.
        runs_done: the number of runs that were finished in an earlier process.
        quiet: show nothing.
    """

    def __init__(self, config: Config, runs_done: int, *, quiet: bool) -> None:
        from tqdm import tqdm

        self._quiet = quiet
        self._epochs = config.epochs
        self._runs = len(config.seeds) * len(config.optimizer)
        self._runs_done = runs_done
        self._steps = 0
        self._bar = tqdm(
            disable=quiet or not sys.stderr.isatty(),
            file=sys.stderr,
            unit="step",
            dynamic_ncols=True,
            leave=False,
        )

    def start(self, run: Run, steps_per_epoch: int) -> None:
        self._steps = self._epochs * steps_per_epoch
        self._bar.total = self._runs * self._steps
        if self._bar.n == 0:
            # Steps of an earlier process count for the bar's length, not for its speed.
            self._bar.initial = self._runs_done * self._steps + run.epoch * steps_per_epoch
            self._bar.n = self._bar.initial
        self._bar.set_description(f"{run.optimizer_name} seed {run.seed}")

    def step(self) -> None:
        self._bar.update()

    def end(self, row: Row) -> None:
        self._runs_done += 1
        self._bar.update(self._runs_done * self._steps - self._bar.n)  # a diverged run ends early
        if self._quiet:
            return
        result = "diverged" if row.status == "diverged" else f"test accuracy {100 * row.test_accuracy:.2f} %"
        self._bar.write(
            f"[{self._runs_done}/{self._runs}] {row.optimizer} seed {row.seed}, epoch {row.epoch}: {result}",
            file=sys.stderr,
        )

    def close(self) -> None:
        self._bar.close()
