"""The paper's hyperparameters (Tables 4 and 5) and schedules (Appendix E.2), which ``tables.py`` uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ...topology.densities import Distribution
from ..training import distributed
from ..training.config import Config, new_config
from .experiment import Settings
from .paper_figures import Cell

Clip = Literal["none", "active", "dense"]


@dataclass(frozen=True)
class Recipe:
    """A network, a data set, and the hyperparameters that the runs of a table share.

    The learning rate rises from ``start_lr`` to the peak in ``warmup_epochs``, then falls as a cosine to
    ``end_lr`` at the last step (``schedules.warmup_cosine``).
    """

    data: str
    model: str
    batch_size: int
    """The total batch size; with ``base_batch_size``, that of each rank ("128 (scaled by factor)")."""
    base_lr: float
    """The peak learning rate, or with ``base_batch_size`` the peak for a batch of that size."""
    base_batch_size: int | None
    """The peak is ``base_lr * batch / base_batch_size`` with the batch of all ranks; None: no scaling."""
    momentum: float
    weight_decay: float
    warmup_epochs: int
    start_lr: float
    end_lr: float
    distribution: Distribution
    drop_fraction: float
    update_every: int
    ham_alpha: float | None
    """``h1``; None if the paper has no runs with HAM."""
    train_images: int
    """The number of images in an epoch, to estimate its time."""

    def config(self, cell: Cell, seed: int, clip: Clip, settings: Settings, threads: int = 1) -> Config:
        """Return the configuration of the run of a table's cell.

        Args:
            cell: the cell.
            seed: of all random numbers.
            clip: the positions over which the norm of the gradients is taken that is limited to
                ``MAX_GRAD_NORM``; ``"none"`` for no limit.
            settings: of the machine.
            threads: of PyTorch, on a CPU.

        Raises:
            TrainingError: it cannot run on this machine.
        """
        given: dict[str, Any] = {
            "data": self.data,
            "data_dir": settings.data_dir,
            "model": self.model,
            "method": cell.dst,
            "sparsity": cell.sparsity,
            "optimizer": (cell.optimizer,),
            "seeds": (seed,),
            "epochs": cell.epochs,
            "batch_size": self.total_batch_size,
            "lr": self.peak_lr,
            "start_lr": self.start_lr,
            "end_lr": self.end_lr,
            "warmup_epochs": self.warmup_epochs,
            "momentum": self.momentum,
            "weight_decay": self.weight_decay,
            "distribution": self.distribution,
            "drop_fraction": self.drop_fraction,
            "update_every": self.update_every,
            "ham_alpha": (self.ham_alpha or 0.0) if cell.ham else 0.0,
            "max_grad_norm": None if clip == "none" else MAX_GRAD_NORM,
            "max_grad_norm_over": "dense" if clip == "dense" else "active",
            "skip_step": True,  # as the published codes of RigL and jaxpruner do
            "threads": threads,
            "device": settings.device,
            "parallel": settings.parallel,
            "amp": settings.amp,
            "channels_last": settings.channels_last,
            "loader_workers": settings.loader_workers,
        }
        return new_config(given)

    @property
    def total_batch_size(self) -> int:
        return self.batch_size * (distributed.ranks() if self.base_batch_size else 1)

    @property
    def peak_lr(self) -> float:
        if self.base_batch_size is None:
            return self.base_lr
        return self.base_lr * self.total_batch_size / self.base_batch_size


CIFAR100 = Recipe(  # Table 4, E.2.2
    data="cifar-100",
    model="resnet20",
    batch_size=256,
    base_lr=0.1,
    base_batch_size=None,
    momentum=0.9,
    weight_decay=5e-4,
    warmup_epochs=5,
    start_lr=0.0,
    end_lr=1e-6,
    distribution="erk",
    drop_fraction=0.3,
    update_every=100,
    ham_alpha=80.0,
    train_images=50_000,
)

IMAGENET = Recipe(  # Table 5, E.2.1
    data="imagenet",
    model="resnet50",
    batch_size=128,
    base_lr=0.1,
    base_batch_size=256,
    momentum=0.9,
    weight_decay=1e-4,
    warmup_epochs=5,
    start_lr=1e-5,
    end_lr=1e-5,
    distribution="erk",
    drop_fraction=0.3,
    update_every=100,
    ham_alpha=None,
    train_images=1_281_167,
)

MAX_GRAD_NORM = 1.0  # for the tables with gradient renormalisation, Appendix F
