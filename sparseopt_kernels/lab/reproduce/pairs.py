"""A task of a hundred classes from Fashion-MNIST, pairs of images, and one training run of an MLP on it.

The experiment is in ``appendix_f.py``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ... import SET, Masks, RigL, SparseOpt, sparsify, warmup_cosine
from ...correction import Correction, mask_factors
from ..training.data import load_dataset
from ..training.models import mlp
from .layer_scalar import layer_scalar, scale_by_scalar

HIDDEN = (256, 128, 128)
FACTORS: dict[str, Correction] = {
    "none": "none",
    "layer": "layer",
    "D": "unnormalized",
    "scalar": "none",
}
"""The optimizer's correction by factor; the scalar is applied to the gradients before the step instead."""
CLIPS = ("none", "active", "dense")
_LOOK_EVERY = 25
_POOLING = 2


class Images(NamedTuple):
    """Images ``(N, pixels)`` float32 and labels ``(N,)`` int64."""

    images: Tensor
    labels: Tensor

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1

    def pairs(self, count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return random pairs: the pixels of both images, and ``first label * classes + second label``."""
        first, second = torch.randint(len(self.labels), (2, count), generator=random)
        images = torch.cat([self.images[first], self.images[second]], dim=1)
        return images, self.labels[first] * self.classes + self.labels[second]


class Parts(NamedTuple):
    train: Images
    held_out: Images
    test: Images


@lru_cache(maxsize=1)
def parts(data: str, data_dir: str | None, held_out: int) -> Parts:
    """Return a data set averaged over 2 by 2 pixels; the last ``held_out`` training images are held out.

    Raises:
        TrainingError: the data are not found, or damaged.
    """
    full = load_dataset(data, data_dir)
    train = F.avg_pool2d(full.train_images, _POOLING).flatten(1)
    test = F.avg_pool2d(full.test_images, _POOLING).flatten(1)
    split = len(train) - held_out
    return Parts(
        Images(train[:split], full.train_labels[:split]),
        Images(train[split:], full.train_labels[split:]),
        Images(test, full.test_labels),
    )


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters that all runs share."""

    steps: int
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.05
    """The fraction of the steps."""
    drop_fraction: float = 0.3
    update_every: int = 100
    stop_at: float = 0.75
    """The fraction of the steps after which the masks do not change."""
    test_pairs: int = 10_000


class Way(NamedTuple):
    """The settings of one run."""

    method: str
    sparsity: float
    clip: str
    factor: str
    lr: float
    seed: int


class Training:
    """A training run. Runs of one seed have the same initial weights, masks and pairs. The caller's random
    state does not change."""

    def __init__(self, way: Way, recipe: Recipe, data: Parts) -> None:
        self.way, self.recipe, self.data = way, recipe, data
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(way.seed)
            classes = data.train.classes**2
            self.model = mlp(2 * data.train.images.shape[1], classes, HIDDEN)
        self.masks: Masks = sparsify(self.model, sparsity=way.sparsity, distribution="erk", seed=way.seed)
        self.optimizer = SparseOpt(
            self.model.parameters(),
            lr=way.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            masks=self.masks,
            correction=FACTORS[way.factor],
            max_grad_norm=None if way.clip == "none" else 1.0,
            max_grad_norm_over="dense" if way.clip == "dense" else "active",
        )
        if way.factor == "scalar":
            scale_by_scalar(self.optimizer, self.masks)
        self.schedule = warmup_cosine(self.optimizer, int(recipe.warmup * recipe.steps), recipe.steps)
        every, stop_at = recipe.update_every, recipe.stop_at * recipe.steps
        self.topology: SET | RigL
        if way.method == "set":
            self.topology = SET(self.masks, recipe.drop_fraction, every, stop_at=stop_at, seed=way.seed)
        else:
            self.topology = RigL(self.masks, recipe.drop_fraction, every, stop_at=stop_at)
        self.norms: list[_Norms] = []

    def losses(self) -> Iterator[Tensor]:
        """Train, and yield the loss of each step's batch, a scalar tensor, after the step."""
        random = torch.Generator().manual_seed(self.way.seed)
        for step in range(self.recipe.steps):
            images, labels = self.data.train.pairs(self.recipe.batch_size, random)
            loss = F.cross_entropy(self.model(images), labels)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.topology.step()
            if step % _LOOK_EVERY == 0:
                self.norms.append(self._norms())
            self.optimizer.step()
            self.schedule.step()
            yield loss.detach()

    def accuracy(self, images: Images) -> float:
        """Return the fraction of pairs whose class is predicted; the pairs are the same in all runs."""
        random = torch.Generator().manual_seed(0)
        self.model.eval()
        with torch.no_grad():
            pairs, labels = images.pairs(self.recipe.test_pairs, random)
            right = (self.model(pairs).argmax(dim=1) == labels).double().mean()
        self.model.train()
        return float(right)

    @torch.no_grad()
    def _norms(self) -> _Norms:
        """Return the global norm of the gradients after ``backward``, and the coefficient of the clip."""
        raw_all = raw_active = corrected_all = corrected_active = 0.0
        for parameter in self.model.parameters():
            gradient = parameter.grad
            assert gradient is not None
            if parameter not in self.masks:
                squared = float(gradient.square().sum())
                raw_all, raw_active = raw_all + squared, raw_active + squared
                corrected_all, corrected_active = corrected_all + squared, corrected_active + squared
                continue
            mask = self.masks[parameter]
            corrected = gradient * self._factor(parameter)
            raw_all += float(gradient.square().sum())
            raw_active += float(gradient[mask].square().sum())
            corrected_all += float(corrected.square().sum())
            corrected_active += float(corrected[mask].square().sum())
        limited = {"none": 0.0, "active": corrected_active, "dense": corrected_all}[self.way.clip]
        return _Norms(math.sqrt(raw_all), math.sqrt(raw_active), 1.0 / max(1.0, math.sqrt(limited)))

    def _factor(self, parameter: nn.Parameter) -> Tensor:
        if self.way.factor == "scalar":
            return torch.tensor(layer_scalar(self.masks[parameter]))
        correction = FACTORS[self.way.factor]
        factors = mask_factors(self.masks[parameter], self.masks.neurons(parameter), correction)
        return factors.to(parameter.dtype)


class _Norms(NamedTuple):
    every_position: float
    active: float
    coefficient: float


RESULTS: dict[str, type] = {
    "held_out_accuracy": float,
    "test_accuracy": float,
    "train_loss": float,
    "clip_coefficient": float,
    "norm_all": float,
    "norm_active": float,
    "dead_share": float,
    "seconds": float,
}
"""The columns that :func:`trained` returns. Accuracies are in [0, 1], and NaN if a loss was not finite, which
ends the run. ``train_loss`` is the mean over the last tenth of the steps. The clip's coefficient (1: no clip)
and the norms of the gradients, over all positions and over active ones, are means over every 25th step.
``dead_share`` is the fraction of neurons without an active weight at the end. ``seconds`` is processor time
(in rows of commit 537c19d elapsed time, in which the run may have been stopped)."""


def trained(training: Training) -> dict[str, float]:
    """Train a run to its end and return :data:`RESULTS`."""
    started = time.process_time()
    losses: list[float] = []
    for loss in training.losses():
        losses.append(float(loss))
        if not math.isfinite(losses[-1]):
            break
    last = losses[-max(1, len(losses) // 10) :]
    finite = math.isfinite(losses[-1])
    return {
        "held_out_accuracy": training.accuracy(training.data.held_out) if finite else math.nan,
        "test_accuracy": training.accuracy(training.data.test) if finite else math.nan,
        "train_loss": fmean(last),
        "clip_coefficient": fmean(norms.coefficient for norms in training.norms),
        "norm_all": fmean(norms.every_position for norms in training.norms),
        "norm_active": fmean(norms.active for norms in training.norms),
        "dead_share": training.masks.dead_share(),
        "seconds": time.process_time() - started,
    }
