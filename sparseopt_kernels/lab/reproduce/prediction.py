"""The experiment ``prediction``: tests on one network where a factor per neuron should help.

Before batch norm, a neuron's gradient is proportional to 1/norm(w_i), and with weight decay the norm settles
where the angle of an update does not depend on a factor of the gradient. So a factor should change the start
of training and the time after a mask update, but not the end. Its effect should be larger if fan-in differs
more between neurons, if masks change often, and if weight decay is weak. ``searched.py`` searches the rates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import mean
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ...text_table import aligned
from ...topology.seeding import generator
from ..training.config import Config
from ..training.data import load_dataset
from ..training.models import build_model
from ..training.paired import Paired, paired
from ..training.run import Run
from .experiment import Case, Row, Settings
from .first_steps import UPDATE_EVERY, first_losses
from .interval_picture import draw_intervals, legend_of
from .picture_titles import beyond_noise, draw_title
from .searched import RESULTS, Images, Search, Setting, at_rate, differences, images, measured, rate_of
from .table_text import signed, star, still_missing, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OPTIMIZERS = ("sgd", "eq12", "norm")
"""Masked SGD; Eq. 12; masked SGD with each row's gradient multiplied by norm(w_i) / (RMS of the layer's row
norms)."""
_LABELS = {"eq12": "Eq. 12", "norm": "norm(w) / rms"}
_MODEL = "mlp"
_RATES = (0.01, 0.03, 0.1, 0.3)
_WIDE_FACTOR = 4
_WIDE_SHARE = 0.1
_SECONDS = 10.0  # with one thread of a shared AMD EPYC
_WHEN = {
    "quarter_epoch": "¼ epoch",
    "half_epoch": "½ epoch",
    "first_epoch": "1 epoch",
    "test_accuracy": "end (test)",
}
_COLOURS = ("#56b4e9", "#009e73", "#e69f00", "#0072b2")
_MARKERS = ("o", "^", "s", "D")


@dataclass(frozen=True)
class Prediction:
    """The experiment, with its defaults. Tests make a smaller one."""

    weight_decays: tuple[float, ...] = (0.0, 5e-4)
    updates: tuple[int, ...] = (0, 25, 100)
    """Steps between updates of the masks; 0: static masks."""
    fan_ins: tuple[str, ...] = ("narrow", "wide")
    rates: tuple[float, ...] = _RATES
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    data: str = "fashion-mnist"
    train_images: int = 10_000
    held_out_images: int = 5_000
    test_images: int = 10_000
    epochs: int = 6

    name = "prediction"
    source = "beyond the paper (Sections 3.3 and 4)"
    shows = "whether a factor per neuron changes the start or the end, and where"
    columns: ClassVar[Mapping[str, type]] = {
        "fan_in": str,
        "update_every": int,
        "weight_decay": float,
        "optimizer": str,
        "lr": float,
        "seed": int,
        **RESULTS,
    }
    key = ("fan_in", "update_every", "weight_decay", "optimizer", "lr", "seed")

    def cases(self, rows: Sequence[Row]) -> list[Case]:
        return self._search().cases(rows)

    def seconds(self, case: Case) -> float:
        return _SECONDS

    def check(self, settings: Settings) -> None:
        load_dataset(self.data, settings.data_dir)

    def measure(self, case: Case, settings: Settings) -> list[Row]:
        return [{**case, **measured(self._run(case, settings), self._images(settings))}]

    def kept_case(self) -> Case:
        """Return a case of Eq. 12 with the most frequent mask updates."""
        moving = [case for case in self.cases([]) if case["update_every"]]
        return max(moving, key=lambda case: (case["optimizer"] == "eq12", -case["update_every"]))

    def first_losses(self, case: Case, settings: Settings, steps: int) -> list[float]:
        return first_losses(self._run({**case, "update_every": UPDATE_EVERY}, settings), steps)

    def _images(self, settings: Settings) -> Images:
        return images(self.data, settings.data_dir, self.train_images, self.held_out_images)

    def _run(self, case: Case, settings: Settings) -> Run:
        config = Config(
            epochs=self.epochs,
            batch_size=64,
            warmup_epochs=1,
            update_every=case["update_every"] or 1,
            threads=1,
            device="cpu",
            data=self.data,
            model=_MODEL,
            method="rigl" if case["update_every"] else "static",
            sparsity=0.95,
            distribution="uniform",  # ERK leaves small layers no room for rows of four times the mean
            lr=case["lr"],
            weight_decay=case["weight_decay"],
            max_grad_norm=None,
        )
        correction = "sparseopt" if case["optimizer"] == "eq12" else "sgd"
        run = Run(config, self._images(settings).dataset, correction, case["seed"])
        draw_fan_in(run, wide=case["fan_in"] == "wide")
        if case["optimizer"] == "norm":
            # The hook runs after RigL's step, which sees the gradient unscaled.
            run.optimizer.register_step_pre_hook(lambda *_: scale_by_norm(run))
        return run

    def table(self, rows: Sequence[Row]) -> list[str]:
        header = (
            "fan-in",
            "masks",
            "weight decay",
            "factor",
            "lr",
            *_WHEN.values(),
            "end, own lr",
            "max c_i",
        )
        lines = [header]
        beyond: dict[tuple[str, str], list[Paired]] = {}
        for fan_in, update, decay, optimizer in self._compared():
            same = self.differences(rows, (fan_in, update, decay), optimizer)
            if not same:
                continue
            for column in _WHEN:
                beyond.setdefault((optimizer, column), []).append(same[column])
            lr, own, factor = self._at_own_rate(rows, (fan_in, update, decay), optimizer)
            cells = [signed(same[column]) + star(same[column]) for column in _WHEN]
            masks = f"RigL, every {update}" if update else "static"
            lines.append(
                (fan_in, masks, f"{decay:g}", _LABELS[optimizer], f"{lr:g}", *cells, own, f"{factor:.1f}")
            )
        text = aligned(lines)
        text += wrapped(
            "(accuracy minus that of masked SGD in points, at the rate lr that is best for masked SGD: on "
            "held-out images, at the end on the test images; ± is the 95% interval of paired seeds, * beyond "
            "it; the last difference is with each at its own rate; max c_i is that of Eq. 12 for the last "
            "masks, mean over seeds)"
        )
        text += [
            f"{_LABELS[optimizer]}, {_WHEN[column]}: {mean(abs(r.mean) for r in results):.2f} points apart "
            f"on average over {len(results)} settings; better beyond noise in "
            f"{sum(r.beyond_noise and r.mean > 0 for r in results)}, worse in "
            f"{sum(r.beyond_noise and r.mean < 0 for r in results)} (not corrected for their number)"
            for (optimizer, column), results in beyond.items()
        ]
        return [*text, *still_missing(self, rows)]

    def draw(self, rows: Sequence[Row], figure: Figure) -> None:
        figure.set_size_inches(8, 6.6)
        factors = OPTIMIZERS[1:]
        findings = (self._finding(rows, optimizer) for optimizer in factors)
        draw_title(
            figure,
            "settings that differ from masked SGD beyond noise:",
            *findings,
            *still_missing(self, rows),
        )
        grid = figure.subplots(len(factors), len(self.fan_ins), squeeze=False, sharex=True, sharey=True)
        for i, optimizer in enumerate(factors):
            for j, fan_in in enumerate(self.fan_ins):
                self._draw_panel(grid[i, j], rows, optimizer, fan_in)
                grid[i, j].set_title(f"factor: {_LABELS[optimizer]}, {fan_in} fan-in", loc="left")
            grid[i, 0].set_ylabel("masks, weight decay")
        for axes in grid[-1]:
            axes.set_xlabel("accuracy minus that of masked SGD (points)")
        grid[0, 0].invert_yaxis()
        figure.legend(
            *legend_of(grid.flat),
            loc="outside lower center",
            ncols=len(_WHEN),
            title="at the learning rate that is best for masked SGD; mean and 95% interval over "
            f"{len(self.seeds)} seeds; counted are\nintervals without 0; norm(w) / rms: the norm of a "
            "neuron's weights by the root mean square of those of its layer",
            title_fontsize=8,
        )

    def _finding(self, rows: Sequence[Row], optimizer: str) -> str:
        """Return a sentence that counts the settings in which a factor differs from masked SGD, at the time
        before the end with the most of them, and at the end."""
        places = product(self.fan_ins, self.updates, self.weight_decays)
        found = [same for place in places if (same := self.differences(rows, place, optimizer))]
        if not found:
            return f"{_LABELS[optimizer]}: not compared yet"
        *before, end = _WHEN
        most = max(before, key=lambda column: sum(same[column].beyond_noise for same in found))
        said = (
            f"{beyond_noise([same[column][:2] for same in found], 'better', 'worse')} at {when}"
            for column, when in ((most, _WHEN[most]), (end, "the end"))
        )
        return f"{_LABELS[optimizer]}: {', '.join(said)}"

    def differences(
        self, rows: Sequence[Row], place: tuple[str, int, float], optimizer: str
    ) -> dict[str, Paired]:
        """Return the differences from masked SGD in points, by column, at the best rate of masked SGD; empty
        until that rate is known."""
        lr = self._search().best_rates(rows).get((*place, "sgd"))
        if lr is None:
            return {}
        ours, baseline = (at_rate(self._at(rows, place, name), lr) for name in (optimizer, "sgd"))
        if not ours.keys() & baseline.keys():
            return {}
        return {
            column: paired(
                differences(ours, baseline, column),
                100 / (self.test_images if column == "test_accuracy" else self.held_out_images),
            )
            for column in _WHEN
        }

    def _search(self) -> Search:
        # All rates with all seeds, because optimizers are also compared at one rate.
        columns = ("fan_in", "update_every", "weight_decay", "optimizer")
        values = product(self.fan_ins, self.updates, self.weight_decays, OPTIMIZERS)
        settings: list[Setting] = [dict(zip(columns, v, strict=True)) for v in values]
        return Search(
            settings=settings, rates=lambda setting: self.rates, seeds=self.seeds, searching=len(self.seeds)
        )

    def _compared(self) -> list[tuple[str, int, float, str]]:
        return list(product(self.fan_ins, self.updates, self.weight_decays, OPTIMIZERS[1:]))

    def _at(self, rows: Sequence[Row], place: tuple[str, int, float], optimizer: str) -> list[Row]:
        wanted = (*place, optimizer)
        return [row for row in rows if tuple(row[name] for name in self.key[:4]) == wanted]

    def _at_own_rate(
        self, rows: Sequence[Row], place: tuple[str, int, float], optimizer: str
    ) -> tuple[float, str, float]:
        """Return the best rate of masked SGD, the final difference with each at its own best rate, and the
        mean over seeds of the largest c_i."""
        best = self._search().at_best_rate(rows)
        ours, baseline = (best.get((*place, name), {}) for name in (optimizer, "sgd"))
        lr = rate_of(baseline)
        if not ours:
            return lr, "no rate", math.nan
        end = paired(differences(ours, baseline, "test_accuracy"), 100 / self.test_images)
        at_own_rate = f"{signed(end)}{star(end)} ({rate_of(ours):g})"
        return lr, at_own_rate, mean(row["largest_factor"] for row in ours.values())

    def _draw_panel(self, axes: Axes, rows: Sequence[Row], optimizer: str, fan_in: str) -> None:
        places = list(product(self.updates, self.weight_decays))
        for k, (column, label) in enumerate(_WHEN.items()):
            points = [
                (y + 0.17 * (k - 1.5), found[column])
                for y, (update, decay) in enumerate(places)
                if (found := self.differences(rows, (fan_in, update, decay), optimizer))
            ]
            if points:
                draw_intervals(axes, points, _COLOURS[k], label, marker=_MARKERS[k])
        axes.axvline(0, color="black", linewidth=0.8)
        labels = [f"{f'RigL, every {u}' if u else 'static'}, decay {d:g}" for u, d in places]
        axes.set_yticks(range(len(places)), labels, fontsize=7.5)


@torch.no_grad()
def draw_fan_in(run: Run, *, wide: bool) -> None:
    """Redraw the masks of a run with another distribution of fan-in, before its first step. Each mask keeps
    its number of active weights.

    Narrow: all rows have the same fan-in, to within one. Wide: a tenth of the rows have four times the mean,
    or all of their weights if that is fewer, and the others share the rest. The last layer, which no batch
    norm follows, is narrow in either case. Weights that become active get the values they had before masking.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        dense = build_model(run.config.model, run.dataset.image_shape, run.dataset.num_classes)
    initial = dict(dense.named_parameters())
    named = run.masks.named()
    for layer, (name, parameter) in enumerate(named.items()):
        mask = run.masks[parameter]
        random = generator(run.seed, layer, 0)
        counts = row_counts(mask, wide=wide and layer < len(named) - 1, random=random)
        # The counts[i] smallest of random numbers in row i are a uniformly random choice.
        rank = torch.rand(mask.flatten(1).shape, generator=random).argsort(dim=1).argsort(dim=1)
        mask.copy_((rank < counts[:, None]).view_as(mask))
        parameter.copy_(initial[name].masked_fill(~mask, 0.0))
    run.initial_fan_in = run.fan_in()
    if run.topology is not None:  # exploration is counted from these masks on
        explored = [mask.clone() for mask in run.masks.values()]
        run.topology.load_state_dict({**run.topology.state_dict(), "explored": explored})


def row_counts(mask: Tensor, *, wide: bool, random: torch.Generator) -> Tensor:
    """Return the fan-in, int64, that :func:`draw_fan_in` gives to each row; the sum is that of ``mask``."""
    rows, columns = mask.flatten(1).shape
    total = int(mask.count_nonzero())
    order = torch.randperm(rows, generator=random)
    counts = torch.zeros(rows, dtype=torch.int64)
    heavy = max(1, round(_WIDE_SHARE * rows)) if wide else 0
    each = min(columns, round(_WIDE_FACTOR * total / rows))
    counts[order[:heavy]] = each
    rest = order[heavy:]
    share, more = divmod(total - heavy * each, len(rest))
    counts[rest] = share
    counts[rest[:more]] += 1
    return counts


@torch.no_grad()
def scale_by_norm(run: Run) -> None:
    """Multiply the gradient of row i of each masked weight by norm(w_i) / (RMS of the layer's row norms)."""
    for parameter in run.masks:
        gradient: Any = parameter.grad
        norms = parameter.flatten(1).norm(dim=1)
        factors = (norms / norms.square().mean().sqrt()).nan_to_num(1.0)
        gradient.mul_(factors.view(-1, *(1,) * (parameter.ndim - 1)))
