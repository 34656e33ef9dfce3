"""Results as text: the CSV file, the final table, and the conclusions."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import astuple, fields
from statistics import mean, median, stdev

from ...text_table import aligned
from .config import Config
from .paired import FEWEST_PAIRS, paired
from .run import Row


def results_csv(rows: Sequence[Row]) -> str:
    """Return a header and one line per optimizer, seed and epoch, with numbers in full precision."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in fields(Row))
    writer.writerows(astuple(row) for row in rows)
    return text.getvalue()


def table(rows: Sequence[Row], config: Config, test_examples: int) -> str:
    """Return the results of the finished runs, one line per optimizer, and a conclusion.

    Accuracies are those after the last epoch: the test set is not used to choose an epoch.
    """
    final = last_rows(rows, config)
    diverged = [row for row in rows if not _is_ok(row)]
    runs = len(config.seeds) * len(config.optimizer)
    ended = [name for name in config.optimizer if any(optimizer == name for optimizer, _ in final)]
    lines = []
    if final:
        level = _level(final)
        header = ("optimizer", "runs", "test accuracy", "train loss", f"epochs to {level:.0%}", "s/epoch")
        lines += aligned([header, *(_line(name, rows, final, level) for name in ended)])
        if len(config.seeds) > 1:
            lines.append("(test accuracy after the last epoch: mean ± standard deviation over seeds)")
    lines += [
        f"{row.optimizer} seed {row.seed} diverged in epoch {row.epoch} (its loss is not finite): "
        "try a smaller --lr"
        for row in diverged
    ]
    if len(final) + len(diverged) < runs:
        lines.append(
            f"{runs - len(final) - len(diverged)} of {runs} runs did not finish and are not in the table"
        )
    baseline = next((name for name in ("by-hand", "sgd") if name in ended), None)
    if baseline is not None:
        lines += [comparison(name, baseline, final, test_examples) for name in ended if name != baseline]
    return "\n".join(lines)


def comparison(name: str, baseline: str, final: dict[tuple[str, int], Row], test_examples: int) -> str:
    """Return a sentence on the mean difference in test accuracy, over the seeds that both have.

    Two runs of one seed share initial weights, masks and order of examples. The difference counts as more
    than noise if 0 is outside its 95% confidence interval.
    """
    differences = accuracy_differences(name, baseline, final)
    if not differences:
        return f"{name} and {baseline} have no seed in common: no comparison"
    # Accuracies are multiples of one example.
    result = paired(differences, resolution=100 / test_examples)
    difference = f"{name} - {baseline}: {result.mean:+.2f} points"
    if len(differences) < FEWEST_PAIRS:
        return f"{difference}, noise unknown: name at least {FEWEST_PAIRS} --seeds to judge it"
    verdict = "more than" if result.beyond_noise else "within"
    return (
        f"{difference} ± {result.half_width:.2f} (95% confidence, {len(differences)} paired seeds): "
        f"{verdict} the noise of the seeds"
    )


def accuracy_differences(name: str, baseline: str, final: dict[tuple[str, int], Row]) -> list[float]:
    """Return the accuracy of ``name`` minus that of ``baseline``, in points, for each seed that both have.

    Args:
        final: the last rows by optimizer and seed.
    """
    seeds = [seed for optimizer, seed in final if optimizer == name and (baseline, seed) in final]
    return [100 * (final[name, seed].test_accuracy - final[baseline, seed].test_accuracy) for seed in seeds]


def last_rows(rows: Sequence[Row], config: Config) -> dict[tuple[str, int], Row]:
    """Return the last rows of the runs that came to their end, by optimizer and seed."""
    return {(row.optimizer, row.seed): row for row in rows if row.epoch == config.epochs and _is_ok(row)}


def _line(name: str, rows: Sequence[Row], final: dict[tuple[str, int], Row], level: float) -> tuple[str, ...]:
    last = [row for (optimizer, _), row in final.items() if optimizer == name]
    own = [row for row in rows if row.optimizer == name and _is_ok(row)]
    reached = [
        min((row.epoch for row in own if row.seed == end.seed and row.test_accuracy >= level), default=None)
        for end in last
    ]
    epochs = [epoch for epoch in reached if epoch is not None]
    accuracies = [100 * row.test_accuracy for row in last]
    spread = f" ± {stdev(accuracies):.2f}" if len(last) > 1 else ""
    return (
        name,
        str(len(last)),
        f"{mean(accuracies):.2f}{spread} %",
        f"{mean(row.train_loss for row in last):.4f}",
        f"{mean(epochs):.1f}" if len(epochs) == len(last) else f"{len(epochs)} of {len(last)} runs",
        f"{median(row.seconds for row in own):.3g}",
    )


def _level(final: dict[tuple[str, int], Row]) -> float:
    """Return an accuracy that every optimizer reaches on average: one to two points below the worst mean."""
    by_optimizer: dict[str, list[float]] = {}
    for (optimizer, _), row in final.items():
        by_optimizer.setdefault(optimizer, []).append(row.test_accuracy)
    return max(0.0, (math.floor(100 * min(map(mean, by_optimizer.values()))) - 1) / 100)


def _is_ok(row: Row) -> bool:
    return row.status == "ok"
