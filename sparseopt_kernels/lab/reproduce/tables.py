"""Tables 1, 2, 3 and 6 to 9 of the paper: test accuracy of RigL and SET with masked SGD and SparseOpt, at the
paper's size. Hyperparameters are in ``recipes.py``, the paper's figures in ``paper_figures.py``, the picture
in ``tables_picture.py``.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ...text_table import aligned
from ..atomic import write_atomically
from ..training import distributed
from ..training.config import saved_config
from ..training.data import open_dataset
from ..training.errors import TrainingError
from ..training.run import Row as Epoch
from ..training.run import Run
from ..training.sharded_checkpoint import load_from, remove_others, state_for
from .experiment import Case, Row, Settings
from .layer_scalar import scale_by_scalar
from .paper_figures import PAPER, Cell
from .paper_figures import Figure as Printed
from .recipes import CIFAR100, IMAGENET, Clip, Recipe
from .table_text import mean_and_spread, seeds_of, still_missing
from .tables_picture import draw_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SPARSITIES = (0.90, 0.95, 0.97)
_METHODS = (("sparseopt", True), ("sparseopt", False), ("sgd", True), ("sgd", False))  # as in the paper
# Also measured in the tables with renormalised gradients: factors that the paper may have used there, and the
# norm over active weights.
_CONTROLS = (("unnormalized", False), ("scalar", False))
_WITH_EITHER_NORM = (("sparseopt", False), ("sgd", False))
_NAMES = {
    ("unnormalized", False): "D alone",
    ("scalar", False): "scalar",
    ("sparseopt", True): "SparseOpt, HAM",
    ("sparseopt", False): "SparseOpt",
    ("sgd", True): "SGD, HAM",
    ("sgd", False): "SGD",
}
_DST = {"rigl": "RigL", "set": "SET"}
_COLUMNS: dict[str, type] = {
    "dst": str,
    "sparsity": float,
    "epochs": int,
    "clip": str,
    "optimizer": str,
    "ham": bool,
    "seed": int,
    "batch_size": int,
    "lr": float,
    "ranks": int,
    "device": str,
    "amp": str,
    "status": str,
    "test_accuracy": float,
    "test_loss": float,
    "train_accuracy": float,
    "train_loss": float,
    "exploration_rate": float,
    "seconds": float,
}
_RENORMALISED = (
    "the norm of the gradients is limited to 1 over all positions, masked ones too; in the lines that say",
    "'active', over active weights. The paper does not say over which. All positions are inferred: where an",
    "optimizer masks gradients inside, as jaxpruner's does, a clip in the training loop sees them. SparseOpt",
    "is Eq. 12. Beside it, without figures in the paper: D alone, c_i = sqrt(1 - s_i), and the scalar",
    "sqrt(1 - s_avg) for all neurons of a layer, which has no direction",
)
# Images per second in training. The figure for a thread was measured (AMD EPYC, PyTorch 2.13, float32); that
# for a GPU is an assumption.
_SPEED: dict[str, dict[str, float]] = {
    "cifar-100": {"thread": 120, "gpu": 10_000},
    "imagenet": {"thread": 1.4, "gpu": 1_000},
}


class Method(NamedTuple):
    """A line of a table: an optimizer, True for HAM, and the clip."""

    optimizer: str
    ham: bool
    clip: Clip

    @property
    def name(self) -> str:
        return _NAMES[self.optimizer, self.ham] + (", active" if self.clip == "active" else "")


@dataclass(frozen=True)
class Table:
    """A table of the paper.

    Cells are measured with several seeds if the paper gives standard deviations. It does not give the number
    of its seeds.
    """

    number: int
    recipe: Recipe
    epochs: tuple[int, ...]
    """The lengths of training in epochs, each of which is a run of its own."""
    dst: tuple[str, ...]
    seeds: tuple[int, ...]
    renormalised: bool = False
    """True if the norm of the gradients is limited (Appendix F)."""

    @property
    def name(self) -> str:
        return f"table{self.number}"

    @property
    def source(self) -> str:
        return f"Table {self.number}"

    @property
    def shows(self) -> str:
        network = {"resnet20": "ResNet-20 on CIFAR-100", "resnet50": "ResNet-50 on ImageNet"}
        norm = ", gradients renormalised" if self.renormalised else ""
        dst = " and ".join(_DST[name] for name in self.dst)
        return f"test accuracy of {network[self.recipe.model]}, {dst}{norm}"

    @property
    def methods(self) -> list[Method]:
        """The lines of the table."""
        paper = [(o, h) for o, h in _METHODS if not h or self.recipe.ham_alpha is not None]
        if not self.renormalised:
            return [Method(o, h, "none") for o, h in paper]
        over_all = [Method(o, h, "dense") for o, h in (*paper, *_CONTROLS)]
        return [*over_all, *(Method(o, h, "active") for o, h in _WITH_EITHER_NORM)]

    @property
    def columns(self) -> Mapping[str, type]:
        return _COLUMNS

    @property
    def key(self) -> Sequence[str]:
        return ("dst", "sparsity", "epochs", "clip", "optimizer", "ham", "seed")

    def cases(self, rows: Sequence[Row]) -> list[Case]:
        """Return all cases, short runs first, and all methods of a setting in a row, so that they can be
        compared early."""
        return [
            {"dst": d, "sparsity": s, "epochs": e, "clip": clip, "optimizer": o, "ham": h, "seed": seed}
            for e in self.epochs
            for s in _SPARSITIES
            for d in self.dst
            for seed in self.seeds
            for o, h, clip in self.methods
        ]

    def seconds(self, case: Case) -> float:
        return _images(self.recipe, [case]) / _SPEED[self.recipe.data]["thread"]

    def cost(self, cases: Sequence[Case]) -> str:
        speed = _SPEED[self.recipe.data]
        images = _images(self.recipe, cases)
        cell = {column: value for column, value in cases[0].items() if column != "seed"}
        only = " ".join(f"{column}={value}" for column, value in cell.items())
        return (
            f"{sum(case['epochs'] for case in cases):,} epochs of {self.recipe.train_images:,} images: "
            f"{_long(images / speed['gpu'])} on one GPU if it trains on {speed['gpu']:,} images a second (an "
            f"assumption, not measured), {_long(images / speed['thread'])} on one thread of a CPU\n"
            f"one cell of the table: sparseopt reproduce {self.name} --only {only}"
        )

    def check(self, settings: Settings) -> None:
        case = self.cases([])[0]
        config = self.recipe.config(_cell(case), case["seed"], case["clip"], settings)
        # Only one rank may download the data.
        distributed.from_first(lambda: bool(open_dataset(config.data, config.data_dir)))

    def measure(self, case: Case, settings: Settings) -> list[Row]:
        config = self.recipe.config(_cell(case), case["seed"], case["clip"], settings)
        dataset = open_dataset(config.data, config.data_dir, config.loader_workers)
        device = distributed.local_device(config.device)
        is_scalar = case["optimizer"] == "scalar"
        run = Run(config, dataset.to(device), "sgd" if is_scalar else case["optimizer"], case["seed"])
        if is_scalar:
            scale_by_scalar(run.optimizer, run.masks)
        checkpoint = settings.checkpoint(case)
        seconds = _resume(run, checkpoint) if checkpoint is not None and checkpoint.exists() else 0.0
        while not run.done:
            epoch = run.train_epoch()
            seconds += epoch.seconds
            if settings.progress and distributed.rank() == 0:
                _report(self.name, case, epoch)
            if checkpoint is not None and not run.done:
                _save(run, seconds, checkpoint)
        return [
            {
                **case,
                "batch_size": config.batch_size,
                "lr": config.lr,
                "ranks": distributed.ranks(),
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
                "amp": config.amp,
                "status": epoch.status,
                "test_accuracy": 100 * epoch.test_accuracy,
                "test_loss": epoch.test_loss,
                "train_accuracy": 100 * epoch.train_accuracy,
                "train_loss": epoch.train_loss,
                "exploration_rate": epoch.exploration_rate,
                "seconds": seconds,
            }
        ]

    def table(self, rows: Sequence[Row]) -> list[str]:
        paper = PAPER[self.number]
        header = ["method", "DST", "sparsity"]
        for epochs in self.epochs:
            header += [f"{epochs} epochs", "paper"]
        lines = []
        for sparsity in _SPARSITIES:
            for dst in self.dst:
                for method in self.methods:
                    line = [method.name, _DST[dst], f"{sparsity:.2f}"]
                    for cell in self._cells(dst, sparsity, method):
                        ours = _accuracies(rows, cell, method.clip)
                        line += [mean_and_spread(ours, 2), _printed(paper.get(cell))]
                    lines.append(line)
        diverged = sum(row["status"] == "diverged" for row in rows)
        return [
            *aligned([header, *lines]),
            f"test accuracy in %, after the last epoch; mean ± standard deviation over {seeds_of(rows)}",
            *(_RENORMALISED if self.renormalised else ()),
            *still_missing(self, rows),
            *([f"{diverged} runs diverged and are not in the table"] if diverged else []),
        ]

    def draw(self, rows: Sequence[Row], figure: Figure) -> None:
        paper = PAPER[self.number]
        draw_table(
            figure,
            f"Table {self.number}: {self.shows}",
            {
                (dst, s): {
                    method.name: (
                        {c.epochs: _accuracies(rows, c, method.clip) for c in self._cells(dst, s, method)},
                        {c.epochs: paper[c].mean for c in self._cells(dst, s, method) if c in paper},
                    )
                    for method in self.methods
                }
                for dst in self.dst
                for s in _SPARSITIES
            },
            still_missing(self, rows),
        )

    def _cells(self, dst: str, sparsity: float, method: Method) -> list[Cell]:
        """Return the cells of a line, one for each length of training."""
        return [
            Cell(dst=dst, sparsity=sparsity, optimizer=method.optimizer, ham=method.ham, epochs=epochs)
            for epochs in self.epochs
        ]


def _images(recipe: Recipe, cases: Sequence[Case]) -> int:
    epochs: int = sum(case["epochs"] for case in cases)
    return recipe.train_images * epochs


def _cell(case: Case) -> Cell:
    return Cell(**{name: case[name] for name in Cell._fields})


def _accuracies(rows: Sequence[Row], cell: Cell, clip: Clip) -> list[float]:
    """Return the test accuracy of a cell for each seed whose run came to its end."""
    wanted = (cell, clip, "ok")
    return [row["test_accuracy"] for row in rows if (_cell(row), row["clip"], row["status"]) == wanted]


def _printed(figure: Printed | None) -> str:
    """Return a figure as the paper prints it, or ``-`` for None."""
    if figure is None:
        return "-"
    return f"{figure.mean:.2f}" if figure.std is None else f"{figure.mean:.2f} ± {figure.std:.2f}"


def _save(run: Run, seconds: float, checkpoint: Path) -> None:
    state = state_for(checkpoint, run)
    if distributed.rank() != 0:
        return
    content = io.BytesIO()
    torch.save({"config": run.config.to_dict(), "run": state, "seconds": seconds}, content)
    try:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(checkpoint, content.getvalue())
    except OSError as error:
        raise TrainingError(f"cannot write the checkpoint {checkpoint}: {error}", exit_code=1) from error
    remove_others(checkpoint, state)


def _resume(run: Run, checkpoint: Path) -> float:
    """Continue the run from the checkpoint and return the seconds it has taken so far."""
    try:
        state: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise TrainingError(
            f"{checkpoint} cannot be read ({str(error).splitlines()[0]}): remove it to start that run again"
        ) from error
    former = state["config"]
    if former["batch_size"] != run.config.batch_size:
        raise TrainingError(
            f"{checkpoint} is of a batch of {former['batch_size']}, and here it is {run.config.batch_size} "
            "(for ImageNet it grows with the ranks): continue with as many ranks as before, or remove it"
        )
    if ("folder" in state["run"]) != run.is_sharded:
        raise TrainingError(
            f"{checkpoint} was made with{'out' if run.is_sharded else ''} --parallel fsdp: do the same now, "
            "or remove it to start that run again"
        )
    own = {name: value for name, value in run.config.to_dict().items() if name != "parallel"}
    saved_config({**former, "parallel": run.config.parallel}, own, checkpoint)  # refuses other options
    load_from(checkpoint, run, state["run"])
    return float(state["seconds"])


def _report(name: str, case: Case, epoch: Epoch) -> None:
    from tqdm import tqdm

    left = epoch.seconds * (case["epochs"] - epoch.epoch)
    shown = " ".join(f"{column}={value}" for column, value in case.items())
    tqdm.write(
        f"{name} {shown}: epoch {epoch.epoch}, loss {epoch.train_loss:.3f}, test accuracy "
        f"{100 * epoch.test_accuracy:.2f} %, {epoch.seconds:.0f} s, {left / 3600:.1f} h left",
        file=sys.stderr,
    )


def _long(seconds: float) -> str:
    days = seconds / 86_400
    if days < 2:
        return f"{24 * days:.1f} hours"
    return f"{days:.0f} days" if days < 730 else f"{days / 365:.0f} years"


def _tables() -> dict[str, Table]:
    imagenet = partial(Table, recipe=IMAGENET, seeds=(0,))
    cifar = partial(Table, recipe=CIFAR100, epochs=(100, 200, 300, 500), seeds=(0, 1, 2))
    made = (
        imagenet(number=1, epochs=(90, 180, 270), dst=("rigl", "set")),
        cifar(number=2, dst=("rigl",)),
        cifar(number=3, dst=("set",)),
        imagenet(number=6, epochs=(90, 270), dst=("rigl",), renormalised=True),
        imagenet(number=7, epochs=(90, 270), dst=("set",), renormalised=True),
        cifar(number=8, dst=("rigl",), renormalised=True),
        cifar(number=9, dst=("set",), renormalised=True),
    )
    return {table.name: table for table in made}


TABLES = _tables()
"""The tables by name."""
