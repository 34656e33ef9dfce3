"""What the experiments ``small`` and ``resnet20`` compare, their table, and the title of their picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from statistics import mean
from typing import NamedTuple

from ..text_table import aligned
from ..training.paired import Paired, holm, paired
from .experiment import Row
from .searched import differences

OPTIMIZERS = {"sgd": "masked SGD", "eq12": "Eq. 12"}
MODELS = {"mlp": "MLP", "convnet": "convnet", "resnet8": "ResNet-8", "resnet20": "ResNet-20"}
METHODS = {"rigl": "RigL", "set": "SET", "static": "static"}


class Remedy(NamedTuple):
    """What may keep RigL from pouring its growth into neurons whose gradient batch norm has made large."""

    label: str
    max_grad_norm: float | None = None
    skip_step: bool = False
    min_fan_in: int = 0


REMEDIES = {
    "none": Remedy("none"),
    "clip": Remedy("clip", max_grad_norm=1.0),
    "skip": Remedy("skipped step", skip_step=True),
    "both": Remedy("clip and skipped step", max_grad_norm=1.0, skip_step=True),
    "alive": Remedy("min_fan_in=1", min_fan_in=1),
}


class Place(NamedTuple):
    """All that the runs of a comparison have in common."""

    model: str
    method: str
    sparsity: float


class Comparison(NamedTuple):
    """Two ways to train in one place, each at its own best rate."""

    kind: str
    """``"a remedy, masked SGD"``, ``"a remedy, Eq. 12"``: against none; ``"Eq. 12"``: against masked SGD."""
    place: Place
    remedy: str
    rows: Mapping[int, Row]
    baseline_rows: Mapping[int, Row]
    result: Paired
    """In percentage points of test accuracy."""

    @property
    def column(self) -> tuple[str, str]:
        return self.kind, self.remedy


TrainedAs = tuple[Place, str, str]
"""A place, an optimizer, a remedy."""
_REMEDY_COLUMNS = [
    (f"a remedy, {optimizer}", remedy) for optimizer in OPTIMIZERS.values() for remedy in list(REMEDIES)[1:]
]
_EQ12_COLUMNS = [("Eq. 12", remedy) for remedy in REMEDIES]


def compared(at_best: Mapping[TrainedAs, Mapping[int, Row]], resolution: float) -> list[Comparison]:
    """Return each remedy against none, for either optimizer, and Eq. 12 against masked SGD under each remedy,
    wherever both best rates are known.

    Args:
        at_best: rows at the best rate, by seed.
        resolution: one test image, in percentage points.
    """
    found = []
    for place in dict.fromkeys(place for place, _, _ in at_best):
        pairs = [
            (f"a remedy, {label}", remedy, (optimizer, remedy), (optimizer, "none"))
            for optimizer, label in OPTIMIZERS.items()
            for remedy in list(REMEDIES)[1:]
        ]
        pairs += [("Eq. 12", remedy, ("eq12", remedy), ("sgd", remedy)) for remedy in REMEDIES]
        for kind, remedy, ours, baseline in pairs:
            a, b = (at_best.get((place, *way), {}) for way in (ours, baseline))
            if a.keys() & b.keys():
                result = paired(differences(a, b, "test_accuracy"), resolution)
                found.append(Comparison(kind, place, remedy, a, b, result))
    return found


def written(
    at_best: Mapping[TrainedAs, Mapping[int, Row]],
    comparisons: Sequence[Comparison],
    sparsities: Sequence[float],
    resolution: float,
) -> list[str]:
    """Return the lines of the table.

    Args:
        at_best: rows at the best rate by seed, of each place, optimizer and remedy.
        comparisons: all of them; Holm's correction is for their number.
        resolution: one test image, in percentage points.
    """
    judged = [c for c in comparisons if not math.isnan(c.result.p_value)]
    adjusted = holm([c.result.p_value for c in judged])
    sure = {(c.place, c.column) for c, p in zip(judged, adjusted, strict=True) if p < 0.05}
    places = list(dict.fromkeys(place for place, _, _ in at_best))
    ways = [(optimizer, remedy) for optimizer in OPTIMIZERS for remedy in REMEDIES]
    header = [f"{'SGD' if o == 'sgd' else 'Eq. 12'}, {r}" for o, r in ways]
    lines = ["test accuracy in %, mean over seeds at the best rate (the rate)"]
    lines += _by_place(
        header, {place: [_accuracy(at_best.get((place, *way))) for way in ways] for place in places}
    )
    by_column = {(c.place, c.column): c for c in comparisons}
    for columns, about in (
        (_REMEDY_COLUMNS, "what a remedy is worth: the same without it is subtracted"),
        (_EQ12_COLUMNS, "what Eq. 12 adds under a remedy: masked SGD under the same is subtracted"),
    ):
        header = [f"{kind.removeprefix('a remedy, ')}, {remedy}" for kind, remedy in columns]
        cells = {
            place: [_cell(by_column.get((place, column)), sure) for column in columns] for place in places
        }
        lines += ["", f"{about}, in points", *_by_place(header, cells)]
    lines.append(
        "(± is the 95% interval of paired seeds; * beyond noise by itself, ** also after Holm's correction "
        f"for {len(judged)} comparisons; a clip limits the gradient norm over active weights to 1; a skipped "
        "step is the one that follows an update of the masks, so that static masks have none; alive: "
        "min_fan_in=1)"
    )
    lines += ["", "mean differences", *_pooled(judged, sparsities, resolution)]
    lines.append(
        "(each seed's mean over networks; ± over seeds, not corrected for the number of means; the training "
        "loss is over all sparsities)"
    )
    lines += ["", "neurons without an active weight at the end, in %, mean over networks and seeds"]
    lines += [*_dead(at_best, sparsities), ""]
    for kind in dict.fromkeys(c.kind for c in judged):
        lines.append(_count(kind, [c for c in judged if c.kind == kind], sure))
    return lines


def title(comparisons: Iterable[Comparison]) -> str:
    """Return what Eq. 12 adds under RigL without and with each remedy, as far as it is known."""
    found = []
    words_of = {"none": "without a remedy", "clip": "with a clip", "skip": "with the skipped step"}
    for remedy, words in {**words_of, "both": "with both"}.items():
        own = [
            c.result.mean
            for c in comparisons
            if c.column == ("Eq. 12", remedy) and c.place.method == "rigl" and not math.isnan(c.result.mean)
        ]
        if own:
            found.append(f"{mean(own):+.1f} {words}")
    about = "Final test accuracy under RigL, Eq. 12 minus masked SGD, mean in points"
    return f"{about}:\n{', '.join(found)}" if found else about


def _by_place(header: Sequence[str], cells: Mapping[Place, Sequence[str]]) -> list[str]:
    used = [i for i in range(len(header)) if any(own[i] != "-" for own in cells.values())]
    lines = [
        (f"{MODELS[p.model]}, {METHODS[p.method]}, {p.sparsity:g}", *(own[i] for i in used))
        for p, own in cells.items()
        if any(cell != "-" for cell in own)
    ]
    return aligned([("", *(header[i] for i in used)), *lines])


def _accuracy(rows: Mapping[int, Row] | None) -> str:
    if not rows:
        return "-"
    values = [row["test_accuracy"] for row in rows.values()]
    return f"{100 * mean(values):.2f} ({next(iter(rows.values()))['lr']:g})"


def _cell(c: Comparison | None, sure: set[tuple[Place, tuple[str, str]]]) -> str:
    if c is None:
        return "-"
    star = "**" if (c.place, c.column) in sure else "*" if c.result.beyond_noise else ""
    return _shown(c.result) + star


def _shown(result: Paired) -> str:
    spread = "" if math.isnan(result.half_width) else f" ± {result.half_width:.2f}"
    return f"{result.mean:+.2f}{spread}"


def _pooled(comparisons: Sequence[Comparison], sparsities: Sequence[float], resolution: float) -> list[str]:
    """Over the networks and sparsities of a method, and over the networks of one sparsity: a single setting
    tells little."""
    lines = []
    for method in METHODS:
        for kind, remedy in (*_REMEDY_COLUMNS, *_EQ12_COLUMNS):
            own = [c for c in comparisons if c.place.method == method and c.column == (kind, remedy)]
            if not own:
                continue
            groups = [own, *([c for c in own if c.place.sparsity == s] for s in sparsities)]
            cells = [_mean_of(group, "test_accuracy", resolution) for group in groups]
            what = f"{REMEDIES[remedy].label} - none, {kind.removeprefix('a remedy, ')}"
            if kind == "Eq. 12":
                what = f"Eq. 12 - masked SGD, remedy {REMEDIES[remedy].label}"
            cells.append(_mean_of(own, "train_loss", 1e-6))
            lines.append((f"{METHODS[method]}: {what}", *cells))
    return aligned([("", "all", *(f"{s:g}" for s in sparsities), "100 x training loss"), *lines])


def _mean_of(comparisons: Sequence[Comparison], column: str, resolution: float) -> str:
    if not comparisons:
        return "-"
    by_place = [differences(c.rows, c.baseline_rows, column) for c in comparisons]
    return _shown(paired([mean(values) for values in zip(*by_place, strict=False)], resolution))


def _dead(at_best: Mapping[TrainedAs, Mapping[int, Row]], sparsities: Sequence[float]) -> list[str]:
    """With the masks of each method, at the best rate."""
    lines = []
    for method, optimizer, remedy in product(METHODS, OPTIMIZERS, REMEDIES):
        cells = []
        for sparsity in sparsities:
            shares = [
                row["dead_share"]
                for (place, *way), rows in at_best.items()
                if (place.method, place.sparsity) == (method, sparsity) and way == [optimizer, remedy]
                for row in rows.values()
            ]
            cells.append(f"{100 * mean(shares):.1f}" if shares else "-")
        if any(cell != "-" for cell in cells):
            lines.append((f"{METHODS[method]}: {OPTIMIZERS[optimizer]}, {remedy}", *cells))
    return aligned([("", *(f"{s:g}" for s in sparsities)), *lines])


def _count(kind: str, own: Sequence[Comparison], sure: set[tuple[Place, tuple[str, str]]]) -> str:
    better = [c for c in own if c.result.beyond_noise and c.result.mean > 0]
    worse = [c for c in own if c.result.beyond_noise and c.result.mean < 0]
    counted = [sum((c.place, c.column) in sure for c in group) for group in (better, worse)]
    return (
        f"{kind}: better beyond noise in {len(better)} of {len(own)} comparisons, worse in {len(worse)}; "
        f"after Holm's correction in {counted[0]} and {counted[1]}"
    )
