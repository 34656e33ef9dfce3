"""The comparisons, findings and table of the experiments ``small`` and ``resnet20``. The picture is in
``small_picture.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from statistics import mean
from typing import NamedTuple

from ...text_table import aligned
from ..training.paired import FEWEST_PAIRS, Paired, holm, paired
from .experiment import Row
from .searched import differences, rate_of
from .table_text import signed, star, wrapped

OPTIMIZERS = {"sgd": "masked SGD", "eq12": "Eq. 12"}
MODELS = {"mlp": "MLP", "convnet": "convnet", "resnet8": "ResNet-8", "resnet20": "ResNet-20"}
METHODS = {"rigl": "RigL", "set": "SET", "static": "static masks"}


class Remedy(NamedTuple):
    """A remedy that may keep RigL from growing mostly in neurons whose gradient batch norm has made large."""

    label: str
    max_grad_norm: float | None = None
    skip_step: bool = False
    min_fan_in: int = 0


REMEDIES = {
    "none": Remedy(label="none"),
    "clip": Remedy(label="clip", max_grad_norm=1.0),
    "skip": Remedy(label="skipped step", skip_step=True),
    "both": Remedy(label="clip and skipped step", max_grad_norm=1.0, skip_step=True),
    "alive": Remedy(label="min_fan_in=1", min_fan_in=1),
}
_IN_SENTENCES = {**{name: remedy.label for name, remedy in REMEDIES.items()}, "skip": "skip", "both": "both"}
_TO_SGD, _TO_EQ12, _ADDS = "worth to masked SGD", "worth to Eq. 12", "Eq. 12 adds"
KINDS = (_TO_SGD, _TO_EQ12, _ADDS)
"""The kinds of comparisons: a remedy against none, for masked SGD and for Eq. 12; Eq. 12 against masked SGD,
both under the same remedy."""
_SURE = 0.05
_NO_INTERVALS = f"fewer than {FEWEST_PAIRS} seeds: no interval"


class Place(NamedTuple):
    """The network, method and sparsity that the runs of a comparison share."""

    model: str
    method: str
    sparsity: float


class Comparison(NamedTuple):
    """The comparison of two ways to train in one place, each at its own best rate."""

    kind: str
    """One of ``KINDS``."""
    place: Place
    remedy: str
    rows: Mapping[int, Row]
    baseline_rows: Mapping[int, Row]
    result: Paired
    """The mean difference in percentage points of test accuracy."""

    @property
    def is_judged(self) -> bool:
        """True if there are enough seeds for an interval."""
        return not math.isnan(self.result.p_value)


TrainedAs = tuple[Place, str, str]
"""A place, an optimizer, a remedy."""
AtBest = Mapping[TrainedAs, Mapping[int, Row]]
"""Rows at the best rate by seed, for each way to train."""


def compared(at_best: AtBest, resolution: float) -> list[Comparison]:
    """Return all comparisons whose two best rates are known.

    Args:
        at_best: rows at the best rate, by seed.
        resolution: one test image, in percentage points.
    """
    found = []
    for place, remedy in product(dict.fromkeys(place for place, _, _ in at_best), REMEDIES):
        ways = {_ADDS: (("eq12", remedy), ("sgd", remedy))}
        if remedy != "none":
            ways[_TO_SGD] = ("sgd", remedy), ("sgd", "none")
            ways[_TO_EQ12] = ("eq12", remedy), ("eq12", "none")
        for kind, pair in ways.items():
            a, b = (at_best.get((place, *way), {}) for way in pair)
            if a.keys() & b.keys():
                result = paired(differences(a, b, "test_accuracy"), resolution)
                found.append(
                    Comparison(kind=kind, place=place, remedy=remedy, rows=a, baseline_rows=b, result=result)
                )
    return found


def select(
    comparisons: Iterable[Comparison],
    kind: str,
    remedy: str,
    method: str | None = None,
    sparsity: float | None = None,
) -> list[Comparison]:
    """Return the comparisons of a kind and remedy; None stands for any method or any sparsity."""
    return [
        c
        for c in comparisons
        if (c.kind, c.remedy) == (kind, remedy)
        and method in (None, c.place.method)
        and sparsity in (None, c.place.sparsity)
    ]


def averaged(
    comparisons: Sequence[Comparison], resolution: float, column: str = "test_accuracy"
) -> Paired | None:
    """Return the mean over the comparisons, with an interval from each seed's mean.

    Comparisons with too few seeds for an interval count only if all have too few. None: no seed has all
    comparisons, or a run diverged in each.
    """
    counted = _that_count(comparisons)
    if not counted:
        return None
    seeds = sorted(set.intersection(*(c.rows.keys() & c.baseline_rows.keys() for c in counted)))
    if not seeds:
        return None
    by_seed = [100 * mean(c.rows[s][column] - c.baseline_rows[s][column] for c in counted) for s in seeds]
    return paired(by_seed, resolution)


def _that_count(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return those that count in a mean."""
    counted = [c for c in comparisons if c.is_judged]
    return counted or [c for c in comparisons if not math.isnan(c.result.mean)]


def findings(comparisons: Sequence[Comparison], resolution: float, method: str) -> list[str]:
    """Return sentences on the gain by each remedy, and by Eq. 12 under each, for a method of choosing masks;
    none if nothing is compared."""
    own = [c for c in comparisons if c.place.method == method]
    counted = _that_count(own)
    places = len({c.place for c in counted})
    said = []
    for kind in KINDS:
        parts = []
        for remedy, words in _IN_SENTENCES.items():
            selected = select(counted, kind, remedy)
            found, count = averaged(selected, resolution), len(selected)
            if found is not None:
                fewer = f" (in {count} of {places})" if count != places else ""
                parts.append(f"{words} {found.mean:+.1f}{star(found)}{fewer}")
        if parts:
            said.append(f"{kind}: {', '.join(parts)}")
    if not said:
        return []
    over = f"mean over {places} settings" if places > 1 else "one setting"
    stars = "*: beyond noise" if counted[0].is_judged else _NO_INTERVALS
    return [f"{METHODS[method]}: points of test accuracy, {over} ({stars})", *said]


def written(
    at_best: AtBest, comparisons: Sequence[Comparison], sparsities: Sequence[float], resolution: float
) -> list[str]:
    """Return the lines of the table.

    Args:
        at_best: rows at the best rate by seed, for each place, optimizer and remedy.
        comparisons: all comparisons; Holm's correction is for their number.
        sparsities: in the order of the table.
        resolution: one test image, in percentage points.
    """
    judged = [c for c in comparisons if c.is_judged]
    adjusted = holm([c.result.p_value for c in judged])
    sure = [c for c, p in zip(judged, adjusted, strict=True) if p < _SURE]
    lines = []
    for method in METHODS:
        lines += [line for said in findings(comparisons, resolution, method) for line in wrapped(said)]
    lines += ["", "means over networks and seeds, differences in points of test accuracy"]
    lines += _means(at_best, comparisons, sparsities, resolution)
    lines += wrapped(
        "(worth: the same optimizer without a remedy is subtracted; Eq. 12 adds: masked SGD under the same "
        "remedy is subtracted; settings: networks and sparsities with Eq. 12 and masked SGD; ± is the 95% "
        "interval over seeds, not corrected for the number of means; dead: neurons without an active weight "
        "at the end, in %, at the best rate)"
    )
    lines += [
        "",
        "each setting: test accuracy in %, mean over seeds at the best rate (the rate); differences",
    ]
    lines += _settings(at_best, comparisons, sure)
    intervals = (
        "± is the 95% interval of paired seeds; * beyond noise by itself, ** also after Holm's correction "
        f"for {len(judged)} comparisons"
    )
    lines += wrapped(
        f"({intervals if judged else _NO_INTERVALS}; a clip limits the gradient norm over active weights to "
        "1; the skipped step is the one that follows an update of the masks; static masks have no update)"
    )
    lines += ["", "100 x training loss of the last epoch, mean differences over all settings"]
    lines += _losses(comparisons)
    lines += ["", "settings that are better/worse beyond noise of all, in brackets after Holm's correction"]
    return [*lines, *_counts(judged, sure)]


def dead_share(at_best: AtBest, places: Iterable[Place], optimizer: str, remedy: str) -> float:
    """Return the fraction of neurons without an active weight at the end, over places and seeds; NaN without
    runs."""
    runs = [own for place in places for own in at_best.get((place, optimizer, remedy), {}).values()]
    return mean(row["dead_share"] for row in runs) if runs else math.nan


def _means(
    at_best: AtBest, comparisons: Sequence[Comparison], sparsities: Sequence[float], resolution: float
) -> list[str]:
    header = ("", "settings", *KINDS, "dead, SGD", "dead, Eq. 12")
    lines = []
    for method, sparsity, remedy in product(METHODS, (None, *sparsities), REMEDIES):
        places = [
            place
            for place in dict.fromkeys(place for place, _, _ in at_best)
            if place.method == method and sparsity in (None, place.sparsity)
        ]
        groups = [select(comparisons, kind, remedy, method, sparsity) for kind in KINDS]
        dead = [dead_share(at_best, places, optimizer, remedy) for optimizer in OPTIMIZERS]
        if all(map(math.isnan, dead)):
            continue
        where = f"{METHODS[method]}, {'all' if sparsity is None else f'{sparsity:g}'}"
        lines.append(
            (
                f"{where}, {REMEDIES[remedy].label}",
                str(len(groups[-1])),
                *(_shown(averaged(group, resolution)) for group in groups),
                *("-" if math.isnan(share) else f"{100 * share:.1f}" for share in dead),
            )
        )
    return aligned([header, *lines])


def _settings(at_best: AtBest, comparisons: Sequence[Comparison], sure: Sequence[Comparison]) -> list[str]:
    lines = []
    for place, remedy in product(dict.fromkeys(place for place, _, _ in at_best), REMEDIES):
        accuracies = [_accuracy(at_best.get((place, optimizer, remedy))) for optimizer in OPTIMIZERS]
        if accuracies == ["-", "-"]:
            continue
        own = {c.kind: c for c in comparisons if (c.place, c.remedy) == (place, remedy)}
        where = f"{MODELS[place.model]}, {METHODS[place.method]}, {place.sparsity:g}"
        cells = [_starred(own.get(kind), sure) for kind in KINDS]
        lines.append((f"{where}, {REMEDIES[remedy].label}", *accuracies, *cells))
    return aligned([("", *OPTIMIZERS.values(), "to masked SGD", "to Eq. 12", "Eq. 12 adds"), *lines])


def _losses(comparisons: Sequence[Comparison]) -> list[str]:
    lines = []
    for method, remedy in product(METHODS, REMEDIES):
        groups = [select(comparisons, kind, remedy, method) for kind in KINDS]
        if any(groups):
            cells = [_shown(averaged(group, 1e-6, "train_loss")) for group in groups]
            lines.append((f"{METHODS[method]}, {REMEDIES[remedy].label}", *cells))
    return aligned([("", *KINDS), *lines])


def _counts(judged: Sequence[Comparison], sure: Sequence[Comparison]) -> list[str]:
    lines = []
    for method, remedy in product(METHODS, REMEDIES):
        cells = []
        for kind in KINDS:
            own = select(judged, kind, remedy, method)
            (better, worse), (sure_better, sure_worse) = (
                _counted(own),
                _counted([c for c in own if c in sure]),
            )
            counts = f"{better}/{worse} of {len(own)} ({sure_better}/{sure_worse})"
            cells.append(counts if own else "-")
        if any(cell != "-" for cell in cells):
            lines.append((f"{METHODS[method]}, {REMEDIES[remedy].label}", *cells))
    return aligned([("", *KINDS), *lines])


def _counted(comparisons: Sequence[Comparison]) -> tuple[int, int]:
    """Return the numbers of comparisons that are better and worse beyond noise."""
    found = [c.result.mean for c in comparisons if c.is_judged and c.result.beyond_noise]
    return sum(value > 0 for value in found), sum(value < 0 for value in found)


def _accuracy(rows: Mapping[int, Row] | None) -> str:
    if not rows:
        return "-"
    accuracy = 100 * mean(row["test_accuracy"] for row in rows.values())
    shown = "diverged" if math.isnan(accuracy) else f"{accuracy:.2f}"
    return f"{shown} ({rate_of(rows):g})"


def _starred(c: Comparison | None, sure: Sequence[Comparison]) -> str:
    if c is None:
        return "-"
    return _shown(c.result) + ("**" if c in sure else star(c.result))


def _shown(result: Paired | None) -> str:
    return "-" if result is None or math.isnan(result.mean) else signed(result)
