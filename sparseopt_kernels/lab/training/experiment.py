"""An experiment: makes all its runs one after another, and writes results, weights and checkpoints.

Results and, if asked for, the checkpoint are replaced atomically after each epoch. Under torchrun, rank 0
alone writes, but for checkpoints of sharded parameters: each rank writes its part.
"""

from __future__ import annotations

import io
import json
import os
import platform
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch

from ... import kernels
from ..._version import __version__
from ..atomic import write_atomically
from ..threads import pytorch_threads
from . import distributed
from .checkpoint import Checkpoint, FinishedRun, Progress, save_checkpoint
from .config import Config
from .data import Data, steps_per_epoch
from .errors import TrainingError
from .report import results_csv
from .run import Row, Run
from .sharded_checkpoint import load_from, remove_others, state_for

CONFIG, RESULTS, WEIGHTS = "config.json", "results.csv", "weights"


class Watcher(Protocol):
    """An observer of the progress: called at the start of a run, after each step, and at the end of a run."""

    def start(self, run: Run, steps_per_epoch: int) -> None: ...
    def step(self) -> None: ...
    def end(self, row: Row) -> None: ...


class Experiment:
    """The runs of ``config``. Each seed is trained with every optimizer before the next seed, so that
    finished runs can be compared even if the experiment is stopped.

    Args:
        config: the configuration.
        dataset: the data set ``config.data``.
        output: an existing folder.
        checkpoint: the file to save the progress in, or None.
        progress: the progress of a checkpoint, to continue from.
    """

    def __init__(
        self,
        config: Config,
        dataset: Data,
        output: Path,
        checkpoint: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.config = config
        self.dataset = dataset.to(distributed.local_device(config.device))
        self.output = output
        self.checkpoint = checkpoint
        self.progress = progress or Progress()

    def train(self, watcher: Watcher) -> None:
        """Train all runs that are not finished yet.

        Raises:
            TrainingError: a file cannot be written.
        """
        with pytorch_threads(self.config.threads):
            runs = self._runs()
            first = next(runs, None)  # before anything is written, because making a run may raise
            self.write(CONFIG, json.dumps(self._description(), indent=2).encode() + b"\n")
            self._write_results()
            # So that a run that is killed in its first epoch can be resumed like any other.
            self._save_checkpoint()
            for run in runs if first is None else chain([first], runs):
                self._train_run(run, watcher)

    def _runs(self) -> Iterator[Run]:
        """Yield the runs that are not finished; each is made when it is asked for."""
        for seed in self.config.seeds:
            for optimizer in self.config.optimizer:
                if not self.progress.is_finished(optimizer, seed):
                    yield Run(self.config, self.dataset, optimizer, seed)

    def _train_run(self, run: Run, watcher: Watcher) -> None:
        progress = self.progress
        if progress.current is not None:
            assert self.checkpoint is not None
            load_from(self.checkpoint, run, progress.current)
        steps = steps_per_epoch(run.dataset.train_size, self.config.batch_size)
        watcher.start(run, steps)
        while not run.done:
            row = run.train_epoch(watcher.step)
            progress.rows.append(row)
            if run.done:
                self._keep_model(run)
                progress.current = None
                progress.finished.append(
                    FinishedRun(
                        optimizer=run.optimizer_name,
                        seed=run.seed,
                        initial_fan_in=run.initial_fan_in,
                        fan_in=run.fan_in(),
                    )
                )
                watcher.end(row)
            elif self.checkpoint is not None:
                progress.current = state_for(self.checkpoint, run)
            self._write_results()
            self._save_checkpoint()

    def _keep_model(self, run: Run) -> None:
        content = io.BytesIO()
        torch.save(run.weights(), content)
        self.write(f"{WEIGHTS}/{run.optimizer_name}-seed{run.seed}.pt", content.getvalue())

    def _write_results(self) -> None:
        # Not durable, because the checkpoint is: to survive a kill, nothing has to wait for the disk.
        self.write(RESULTS, results_csv(self.progress.rows).encode(), durable=False)

    def _save_checkpoint(self) -> None:
        if self.checkpoint is not None and distributed.rank() == 0:
            output = os.path.relpath(self.output, self.checkpoint.parent)
            save_checkpoint(self.checkpoint, Checkpoint(self.config.to_dict(), output, self.progress))
            remove_others(self.checkpoint, self.progress.current)

    def write(self, name: str, content: bytes, *, durable: bool = True) -> None:
        """Write a file into the output folder atomically; raise ``TrainingError`` if that fails."""
        if distributed.rank() != 0:
            return
        try:
            (self.output / name).parent.mkdir(exist_ok=True)
            write_atomically(self.output / name, content, durable=durable)
        except OSError as error:
            raise TrainingError(f"cannot write {self.output / name}: {error}", exit_code=1) from error

    def _description(self) -> dict[str, Any]:
        """Return the options, machine and versions, so that the experiment can be repeated."""
        device = torch.device(self.config.device)
        backend = kernels.backend_for(kernels.chosen_name(self.config.backend), device)
        is_cuda = device.type == "cuda"
        return {
            "options": self.config.to_dict(),
            "ranks": distributed.ranks(),
            "backend": kernels.name_of(backend),
            "device": torch.cuda.get_device_name(device) if is_cuda else platform.processor() or "cpu",
            "machine": platform.machine(),
            "system": platform.platform(),
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "sparseopt_kernels": __version__,
        }
