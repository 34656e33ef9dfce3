"""Learning-rate search: the runs to be made, the best rates, and the measurement of one run.

The experiments that use this choose the settings. Rates are chosen by accuracy on held-out training images.
The test images are used once per run, after its last step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import mean

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ...correction import mask_factors
from ..training.data import Dataset, load_dataset, steps_per_epoch
from ..training.evaluation import evaluate
from ..training.run import Run
from .experiment import Case, Row

Setting = dict[str, str | int | float]
"""The columns that all runs of a setting share, and their values."""

RESULTS: Mapping[str, type] = {
    "held_out_accuracy": float,
    "test_accuracy": float,
    "train_loss": float,
    "quarter_epoch": float,
    "half_epoch": float,
    "first_epoch": float,
    "largest_factor": float,
    "dead_share": float,
    "seconds": float,
}
"""The columns that :func:`measured` returns. Accuracies are in [0, 1], and NaN if the loss was not finite.
Those after a quarter, half and one epoch are on held-out images. ``train_loss`` is the mean over the last
epoch. ``largest_factor`` is the largest c_i of Eq. 12 for the final masks, used or not, ``dead_share`` the
fraction of neurons without an active weight in them. ``seconds`` is the processor time of training and
testing (in rows of commit 9ec5a23 elapsed time, in which the run may have been stopped)."""


@dataclass(frozen=True)
class Search:
    """A search: every setting at every rate with the first seeds, then at its best rate with the other seeds.

    ``rates`` returns the rates of a setting. ``searching`` is the number of seeds that are run at all rates.
    """

    settings: Sequence[Setting]
    rates: Callable[[Setting], Sequence[float]]
    seeds: Sequence[int]
    searching: int

    def cases(self, rows: Iterable[Row]) -> list[Case]:
        """Return the cases, all settings of a seed before the next, so that partial results are balanced."""
        best = self.best_rates(rows)
        search = [
            {**setting, "lr": lr, "seed": seed}
            for seed in self.seeds[: self.searching]
            for setting in self.settings
            for lr in self.rates(setting)
        ]
        rest = [
            {**setting, "lr": best[_key(setting)], "seed": seed}
            for seed in self.seeds[self.searching :]
            for setting in self.settings
            if _key(setting) in best
        ]
        return search + rest

    def best_rates(self, rows: Iterable[Row]) -> dict[tuple[object, ...], float]:
        """Return the rate of largest mean held-out accuracy over the first seeds, by a setting's values.

        A setting is left out until its search is complete, or if runs diverged at every rate.
        """
        seeds = self.seeds[: self.searching]
        best = {}
        for key, own in self._by_setting(rows).items():
            found = {(row["lr"], row["seed"]): row["held_out_accuracy"] for row in own}
            rates = self.rates({name: own[0][name] for name in self.settings[0]})
            if not all((lr, seed) in found for lr in rates for seed in seeds):
                continue
            means = {lr: mean(found[lr, seed] for seed in seeds) for lr in rates}
            stable = {lr: value for lr, value in means.items() if not math.isnan(value)}
            if stable:
                best[key] = max(stable, key=lambda lr: stable[lr])
        return best

    def at_best_rate(self, rows: Iterable[Row]) -> dict[tuple[object, ...], dict[int, Row]]:
        """Return the rows at the best rate by seed, by a setting's values."""
        rows = list(rows)
        best, by_setting = self.best_rates(rows), self._by_setting(rows)
        return {key: at_rate(by_setting[key], lr) for key, lr in best.items()}

    def _by_setting(self, rows: Iterable[Row]) -> dict[tuple[object, ...], list[Row]]:
        groups: dict[tuple[object, ...], list[Row]] = {}
        for row in rows:
            groups.setdefault(tuple(row[name] for name in self.settings[0]), []).append(row)
        return groups


def at_rate(rows: Iterable[Row], lr: float) -> dict[int, Row]:
    """Return the rows of one setting at a rate, by seed."""
    return {row["seed"]: row for row in rows if row["lr"] == lr}


def rate_of(rows: Mapping[int, Row]) -> float:
    """Return the learning rate of rows by seed, which is the same in all of them."""
    return float(next(iter(rows.values()))["lr"])


def differences(a: Mapping[int, Row], b: Mapping[int, Row], column: str) -> list[float]:
    """Return ``a - b`` for each seed that both have, in percentage points; NaN if one diverged."""
    return [100 * (a[seed][column] - b[seed][column]) for seed in sorted(a.keys() & b.keys())]


@dataclass(frozen=True)
class Images:
    """A data set whose test part is the held-out images, and the actual test images beside it."""

    dataset: Dataset
    test_images: Tensor
    test_labels: Tensor


@lru_cache(maxsize=2)
def images(data: str, data_dir: str | None, train: int, held_out: int, pooling: int = 1) -> Images:
    """Return the first ``train`` training images, the next ``held_out`` ones, and all test images, averaged
    over squares of ``pooling`` by ``pooling`` pixels.

    Raises:
        TrainingError: the data are not found, or damaged.
    """
    full = load_dataset(data, data_dir)
    labels, held = full.train_labels, slice(train, train + held_out)
    pooled = F.avg_pool2d(full.train_images[: train + held_out], pooling)
    dataset = Dataset(
        train_images=pooled[:train],
        train_labels=labels[:train],
        test_images=pooled[held],
        test_labels=labels[held],
    )
    return Images(dataset, F.avg_pool2d(full.test_images, pooling), full.test_labels)


def measured(run: Run, data: Images) -> dict[str, float]:
    """Train a run on ``data.dataset`` to its end and return :data:`RESULTS`.

    Args:
        run: a new run with at least four steps in an epoch.
        data: the data set of ``run``, and the test images.
    """
    started = time.process_time()
    held_out = data.dataset.test_images, data.dataset.test_labels
    steps = steps_per_epoch(len(data.dataset.train_labels), run.config.batch_size)
    early: list[float] = []
    step = 0

    def look() -> None:
        nonlocal step
        step += 1
        if step in (steps // 4, steps // 2):
            early.append(_accuracy(*evaluate(run.model, *held_out)))

    first = last = run.train_epoch(look)
    while not run.done:
        last = run.train_epoch()
    test = math.nan if run.diverged else _accuracy(*evaluate(run.model, data.test_images, data.test_labels))
    factors = [mask_factors(mask, run.masks.neurons(p)) for p, mask in run.masks.items()]
    return {
        "held_out_accuracy": last.test_accuracy,
        "test_accuracy": test,
        "train_loss": last.train_loss,
        "quarter_epoch": early[0],
        "half_epoch": early[1],
        "first_epoch": first.test_accuracy,
        "largest_factor": max(float(factor.max()) for factor in factors),
        "dead_share": run.masks.dead_share(),
        "seconds": time.process_time() - started,
    }


def _accuracy(loss: float, accuracy: float) -> float:
    return accuracy if math.isfinite(loss) else math.nan  # the argmax of NaN scores means nothing


def _key(setting: Setting) -> tuple[object, ...]:
    return tuple(setting.values())
