"""The tables of docs/when-does-it-help.md are those of the committed rows."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
from result_rows import committed

from sparseopt_kernels.lab.reproduce.appendix_f import AppendixF
from sparseopt_kernels.lab.reproduce.experiment import Row
from sparseopt_kernels.lab.reproduce.resnet20 import RESNET20
from sparseopt_kernels.lab.reproduce.searched import differences
from sparseopt_kernels.lab.reproduce.small import Small
from sparseopt_kernels.lab.reproduce.small_table import Comparison, compared
from sparseopt_kernels.lab.training.paired import Paired, paired

PAGE = (Path(__file__).parents[3] / "docs" / "when-does-it-help.md").read_text().splitlines()
METHODS = {"set": "SET", "rigl": "RigL"}
CLIPS = {"none": "no clip", "active": "clip over active weights", "dense": "clip over all positions"}
FACTORS = ("layer", "D", "scalar")
REMEDIES = {"clip": "clip", "skip": "skipped step", "both": "both", "alive": "`min_fan_in=1`"}
KINDS = {"masked SGD": "worth to masked SGD", "Eq. 12": "worth to Eq. 12"}
_ADDS = "Eq. 12 adds"


def cell(result: Paired, digits: int) -> str:
    """Bold: beyond noise."""
    mean, half_width = f"{result.mean:+.{digits}f}", f"{result.half_width:.{digits}f}"
    mean = mean[1:] if float(mean) == 0 else mean
    return f"**{mean}** ± {half_width}" if result.beyond_noise else f"{mean} ± {half_width}"


def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


class OfAppendixF:
    """Lines of tables: settings at one sparsity, at one rate or each at its best rate."""

    def __init__(self):
        self.experiment = AppendixF()
        self.rows = committed(self.experiment)

    def lines(self, sparsity: float, *, best: bool) -> list[str]:
        of_all = (
            self.experiment._search(sparsity).at_best_rate(self.rows)
            if best
            else self.experiment._at_lr(self.rows)
        )
        found: list[str] = []
        for method, name in METHODS.items():
            of_method: dict[tuple[object, ...], Mapping[int, Row]] = {
                setting[2:]: rows for setting, rows in of_all.items() if setting[:2] == (method, sparsity)
            }
            for clip, words in CLIPS.items():
                base = of_method[clip, "none"]
                accuracy = 100 * sum(row["test_accuracy"] for row in base.values()) / len(base)
                costs = "" if clip == "none" else self.cell(base, of_method["none", "none"])
                factors = (self.cell(of_method[clip, factor], base) for factor in FACTORS)
                found.append(line([f"{name}, {words}", f"{accuracy:.2f}", costs, *factors]))
        return found

    def cell(self, ours: Mapping[int, Row], baseline: Mapping[int, Row]) -> str:
        found = differences(ours, baseline, "test_accuracy")
        return cell(paired(found, 100 / self.experiment.recipe.test_pairs), 2)


class OfSmall:
    """Lines of tables of ``small`` or ``resnet20``: networks, or sparsities of one network."""

    def __init__(self, experiment: Small, method: str = "rigl", digits: int = 1):
        self.method = method
        at_best = experiment._at_best(committed(experiment))
        self.comparisons = compared(at_best, 100 / experiment.test_images)
        self.digits = digits

    def lines(self, places: list[tuple[str, float]], remedies: Iterable[str]) -> list[str]:
        found = [
            line([f"{who}: {REMEDIES[remedy]}", *(self.cell(place, kind, remedy) for place in places)])
            for who, kind in KINDS.items()
            for remedy in remedies
        ]
        return found

    def added(self, places: list[tuple[str, float]], remedies: Mapping[str, str]) -> list[str]:
        return [
            line([words, *(self.cell(place, _ADDS, remedy) for place in places)])
            for remedy, words in remedies.items()
        ]

    def cell(self, place: tuple[str, float], kind: str, remedy: str) -> str:
        (found,) = (c for c in self.comparisons if self.key(c) == (place, kind, remedy))
        off = differences(found.rows, found.baseline_rows, "test_accuracy")
        return cell(found.result, self.digits) if any(off) else "0.0"  # the same runs

    def key(self, c: Comparison) -> tuple[tuple[str, float], str, str] | None:
        if c.place.method != self.method:
            return None
        return (c.place.model, c.place.sparsity), c.kind, c.remedy


def of_resnet20(method: str) -> list[str]:
    table = OfSmall(RESNET20, method, digits=2)
    adds = {"none": "no remedy", "clip": "clip", "skip": "skipped step"}
    return [
        *table.lines(DEEPER, ("clip", "skip")),
        *table.added(DEEPER, {remedy: f"Eq. 12 adds, {words}" for remedy, words in adds.items()}),
    ]


MLP = [("mlp", 0.99), ("mlp", 0.97), ("mlp", 0.95)]
OTHERS = [("convnet", 0.99), ("resnet8", 0.99)]
DEEPER = [("resnet20", 0.97), ("resnet20", 0.95)]
TABLES = {
    "0.97, rate 0.1": lambda: OfAppendixF().lines(0.97, best=False),
    "0.97, best rates": lambda: OfAppendixF().lines(0.97, best=True),
    "0.95, rate 0.1": lambda: OfAppendixF().lines(0.95, best=False),
    "0.9, rate 0.1": lambda: OfAppendixF().lines(0.9, best=False),
    "the remedies": lambda: OfSmall(Small()).lines(MLP, REMEDIES),
    "Eq. 12 adds": lambda: OfSmall(Small()).added(MLP, {"none": "no remedy", **REMEDIES}),
    "other networks": lambda: [
        *OfSmall(Small()).lines(OTHERS, ("clip", "skip", "both")),
        *OfSmall(Small()).added(OTHERS, {"none": "Eq. 12 adds, no remedy", "both": "Eq. 12 adds, both"}),
    ],
    "ResNet-20 with RigL": lambda: of_resnet20("rigl"),
    "ResNet-20 with SET": lambda: of_resnet20("set"),
}


@pytest.mark.parametrize("table", TABLES)
def test_a_table_of_the_page(table):
    expected = TABLES[table]()
    assert len(expected) >= 5
    first = next((i for i, line in enumerate(PAGE) if line == expected[0]), None)
    assert first is not None, "\n".join(expected)
    assert PAGE[first : first + len(expected)] == expected
