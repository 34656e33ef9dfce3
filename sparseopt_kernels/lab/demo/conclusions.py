"""The conclusions of the demo in words. The numbers choose every sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ...text_table import aligned
from ..bench.checks import WRONG
from ..timing import speed
from ..training.config import Config
from ..training.paired import FEWEST_PAIRS, Paired, paired
from ..training.report import accuracy_differences, last_rows
from ..training.run import Row
from .step_time import BY_HAND, CORRECTED, DENSE, PLAIN, TUNED, StepTimes

NAMES = {
    BY_HAND: "by hand",
    TUNED: "by hand, tuned",
    DENSE: "fused SGD, no mask",
    PLAIN: "SparseOpt, no correction",
    CORRECTED: "SparseOpt, Eq. 12",
}
# Names of the substitutes for contestants with fused SGD, by the wrong contestant and its place.
_FOREACH_NAMES = {
    ("sgd fused, no mask", DENSE): "foreach SGD, no mask",
    ("eager chain, tuned", TUNED): "by hand, tuned (foreach)",
}
_SHORT = {PLAIN: "masked SGD", CORRECTED: "Eq. 12"}
_ROUNDING = 1e-4  # of the largest change: float32 has seven digits, and each step loses some


def names_of(measured: StepTimes) -> dict[str, str]:
    """Return the name of each contestant in tables and pictures."""
    stand_ins = {own: name for (wrong, own), name in _FOREACH_NAMES.items() if wrong in measured.wrong}
    return {**NAMES, **stand_ins}


def times_table(measured: StepTimes) -> list[str]:
    """Return a line for each contestant: median, the middle 60% of the steps, and the ratio of its time to
    that of SparseOpt without correction."""
    own, names = measured.times[PLAIN], names_of(measured)
    header = ("step", "median", "middle 60% of the steps", "time / SparseOpt's", "masked")
    rows = [
        (
            names[name],
            f"{t.p50_ms:.3g} ms",
            f"{t.p20_ms:.3g} to {t.p80_ms:.3g} ms",
            f"{t.p50_ms / own.p50_ms:.2f}",
            "no" if name == DENSE else "yes",
        )
        for name, t in measured.times.items()
    ]
    return [*aligned([header, *rows]), *(f"{name}: {WRONG}, not timed" for name in measured.wrong)]


def speed_title(measured: StepTimes) -> str:
    if not measured.is_reliable:
        return "Time of a step (other programs were running: not reliable)"
    return f"SparseOpt's step is {speed(measured.times[PLAIN], measured.times[BY_HAND])} by hand"


def speed_conclusions(measured: StepTimes) -> list[str]:
    """Return sentences that compare SparseOpt's step with each rival, and on the cost of the correction."""
    if not measured.is_reliable:
        return [
            f"Other programs were running: a thread got {measured.processor_share:.0%} of a processor.",
            "Nothing is concluded from the times of steps then. Run it again on a quiet machine.",
        ]
    times, names = measured.times, names_of(measured)
    own = times[PLAIN]
    return [
        f"SparseOpt's masked SGD is {speed(own, times[BY_HAND])} masked SGD by hand.",
        f"It is {speed(own, times[TUNED])} masked SGD {names[TUNED]} (float32 masks, one call for all).",
        f"It is {speed(own, times[DENSE])} PyTorch's {names[DENSE]}.",
        f"With the correction of Eq. 12 it is {speed(times[CORRECTED], own)} without.",
        "(within noise: the middle 60% of the steps overlap)",
    ]


def agreement(measured: StepTimes) -> str:
    """Return a sentence on whether SparseOpt without correction and the code by hand have equal weights."""
    verdict = "equal to rounding" if measured.difference <= _ROUNDING * measured.moved else "NOT equal"
    return (
        f"Weights by SparseOpt without correction and by hand, after {measured.steps} steps on the same "
        f"gradients:\n{verdict} (they differ by {measured.difference:.1e} at most, and moved by up to "
        f"{measured.moved:.1e})"
    )


def without_remedies(config: Config) -> Config:
    """Return ``config`` for the runs of SparseOpt alone, without clip and skipped step."""
    names = tuple(name for name in config.optimizer if name != "by-hand")
    return replace(config, optimizer=names, max_grad_norm=None, skip_step=False)


def remedy_worth(
    rows: Sequence[Row], former: Sequence[Row], config: Config, test_examples: int
) -> dict[str, Paired]:
    """Return the gain by clip and skipped step for each optimizer of ``config``, in points of final test
    accuracy, paired by seed.

    Args:
        rows: with clip and skipped step.
        former: without them.
        config: the configuration of ``former``.
        test_examples: the size of the test set.
    """
    final, without = last_rows(rows, config), last_rows(former, config)
    worth = {}
    for name in config.optimizer:
        both = {
            (label, seed): row
            for label, own in (("with", final), ("without", without))
            for (optimizer, seed), row in own.items()
            if optimizer == name
        }
        differences = accuracy_differences("with", "without", both)
        if len(differences) >= FEWEST_PAIRS:
            worth[name] = paired(differences, 100 / test_examples)
    return worth


def remedy_conclusions(
    rows: Sequence[Row], former: Sequence[Row], config: Config, test_examples: int
) -> list[str]:
    """Return a sentence for each optimizer on its :func:`remedy_worth`, which takes the same arguments."""
    return [
        f"{name}: with both {worth.mean:+.2f} points ± {worth.half_width:.2f} "
        f"({'more than' if worth.beyond_noise else 'within'} the noise of the seeds)"
        for name, worth in remedy_worth(rows, former, config, test_examples).items()
    ]


def accuracy_title(worth: Mapping[str, Paired]) -> str:
    """Return a title that states the gain by clip and skipped step."""
    if not worth:
        return "Test accuracy by epoch"
    differing = [
        f"{_SHORT[name]} {difference.mean:+.1f}"
        for name, difference in worth.items()
        if difference.beyond_noise
    ]
    return "With clip and skipped step:\n" + (
        f"{', '.join(differing)} points" if differing else "no difference of accuracy beyond noise"
    )
