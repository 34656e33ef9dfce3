"""What ``small`` and ``resnet20`` say of rows: the table, the sentences above it, and the picture."""

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure

from sparseopt_kernels.lab.reproduce import small_table
from sparseopt_kernels.lab.reproduce.small import Small

TINY = Small(models=("mlp",), methods=("rigl",), sparsities=(0.9,), seeds=(0, 1, 2), test_images=600)


def made_up(experiment, accuracy, **columns):
    """Rows of all cases, best at a rate of 0.03, where the test accuracy is ``accuracy(case)``."""
    return [
        {
            **case,
            "held_out_accuracy": 0.9 if case["lr"] == 0.03 else 0.5,
            "train_loss": 0.5,
            "dead_share": 0.1 if case["remedy"] == "none" else 0.0,
            "test_accuracy": accuracy(case) if case["lr"] == 0.03 else 0.95,
            **{name: value(case) for name, value in columns.items()},
        }
        for case in experiment.cases([])
    ]


def cells_of(lines, start, after):
    """All cells but the first of the first line that begins so, below the line that begins with ``after``."""
    below = next(i for i, line in enumerate(lines) if line.startswith(after))
    line = next(line for line in lines[below:] if line.startswith(start))
    return [cell.strip() for cell in line.split("  ") if cell.strip()][1:]


def test_small_concludes_from_made_up_rows():
    """Without a remedy Eq. 12 is two points worse, with a clip as good; the clip is worth one point."""
    experiment = replace(TINY, searching=3)

    def accuracy(case):
        clipped = case["remedy"] in ("clip", "both")
        return (
            0.80
            + 0.001 * case["seed"]
            + 0.01 * clipped
            - 0.02 * (case["optimizer"] == "eq12") * (not clipped)
        )

    rows = made_up(experiment, accuracy)
    lines = experiment.table(rows)
    # Equal differences: one of 600 test images is 0.17 points.
    expected = {
        "none": ["80.10 (0.03)", "78.10 (0.03)", "-", "-", "-2.00 ± 0.17**"],
        "clip": ["81.10 (0.03)", "81.10 (0.03)", "+1.00 ± 0.17**", "+3.00 ± 0.17**", "+0.00 ± 0.17"],
        "skipped step": ["80.10 (0.03)", "78.10 (0.03)", "+0.00 ± 0.17", "+0.00 ± 0.17", "-2.00 ± 0.17**"],
        "min_fan_in=1": ["80.10 (0.03)", "78.10 (0.03)", "+0.00 ± 0.17", "+0.00 ± 0.17", "-2.00 ± 0.17**"],
    }
    for remedy, cells in expected.items():
        assert cells_of(lines, f"MLP, RigL, 0.9, {remedy} ", "each setting") == cells
    assert cells_of(lines, "RigL, 0.9, none ", "means over networks") == [
        "1",
        "-",
        "-",
        "-2.00 ± 0.17",
        "10.0",
        "10.0",
    ]
    assert cells_of(lines, "RigL, 0.9, clip ", "means over networks")[-2:] == ["0.0", "0.0"]
    assert any("Holm's correction for 13 comparisons" in line for line in lines)
    assert cells_of(lines, "RigL, clip ", "settings that are") == [
        "1/0 of 1 (1/0)",
        "1/0 of 1 (1/0)",
        "0/0 of 1 (0/0)",
    ]
    assert cells_of(lines, "RigL, none ", "settings that are") == ["-", "-", "0/1 of 1 (0/1)"]
    assert any("at an end of its grid in 0 of 10" in line for line in lines)
    said = [
        "RigL: points of test accuracy, one setting (*: beyond noise)",
        "worth to masked SGD: clip +1.0*, skip +0.0, both +1.0*, min_fan_in=1 +0.0",
        "worth to Eq. 12: clip +3.0*, skip +0.0, both +3.0*, min_fan_in=1 +0.0",
        "Eq. 12 adds: none -2.0*, clip +0.0, skip -2.0*, both +0.0, min_fan_in=1 -2.0*",
    ]
    assert lines[:4] == said
    figure = Figure()
    experiment.draw(rows, figure)
    assert figure.get_suptitle().splitlines() == said


def test_small_averages_over_settings_within_each_seed():
    """Plus three points at one sparsity, minus one at the other: plus one for every seed."""
    experiment = replace(TINY, searching=3, sparsities=(0.9, 0.95))
    rows = made_up(
        experiment,
        lambda case: (
            0.8
            + 0.01 * case["seed"]
            + (case["optimizer"] == "eq12") * (0.03 if case["sparsity"] == 0.9 else -0.01)
        ),
        train_loss=lambda case: 0.5 - 0.01 * case["seed"] * (case["optimizer"] == "eq12"),
    )
    lines = experiment.table(rows)
    found = [cells_of(lines, f"RigL, {s}, clip ", "means over networks") for s in ("all", "0.9", "0.95")]
    assert [(cells[0], cells[3]) for cells in found] == [
        ("2", "+1.00 ± 0.17"),
        ("1", "+3.00 ± 0.17"),
        ("1", "-1.00 ± 0.17"),
    ]
    assert cells_of(lines, "RigL, clip ", "100 x training loss")[2] == "-1.00 ± 2.48"


def test_small_says_where_remedies_are_measured_in_few_settings():
    experiment = replace(TINY, searching=1, sparsities=(0.9, 0.95))
    rows = made_up(experiment, lambda case: 0.8 + 0.01 * (case["remedy"] == "clip"))
    begun = [row for row in rows if row["sparsity"] == 0.9 or row["remedy"] == "none"]
    said = " ".join(experiment.table([row for row in begun if row["seed"] == 0]))
    assert said.startswith(
        "RigL: points of test accuracy, mean over 2 settings (fewer than 3 seeds: no interval) "
        "worth to masked SGD: clip +1.0 (in 1 of 2), skip +0.0 (in 1 of 2), "
    )
    assert " Eq. 12 adds: none +0.0, clip +0.0 (in 1 of 2), " in said


def test_settings_with_too_few_seeds_do_not_count_beside_others():
    """Three seeds of all at 0.9, two of all at 0.95: the means are of 0.9."""
    experiment = replace(TINY, searching=2, sparsities=(0.9, 0.95))
    rows = made_up(
        replace(experiment, searching=3),
        lambda case: 0.8 + 0.01 * (case["remedy"] == "clip") * case["sparsity"],
    )
    begun = [row for row in rows if row["sparsity"] == 0.9 or row["seed"] < 2]
    without_skip = [row for row in begun if row["remedy"] != "skip" or row["seed"] < 2]
    said = " ".join(experiment.table(without_skip))
    assert said.startswith(
        "RigL: points of test accuracy, one setting (*: beyond noise) worth to masked SGD: clip"
    )
    assert "skip +" not in said.partition("means over networks")[0]


def one_comparison(sparsity, by_seed):
    """Of Eq. 12 with masked SGD, by the accuracies of both for each seed."""
    place = small_table.Place("mlp", "rigl", sparsity)
    a, b = ({seed: {"test_accuracy": pair[i]} for seed, pair in by_seed.items()} for i in (0, 1))
    (found,) = small_table.compared({(place, "eq12", "none"): a, (place, "sgd", "none"): b}, 0.1)
    return found


def test_a_mean_over_settings_is_of_the_seeds_that_all_have():
    """Seeds 1 to 3: plus one point and minus three, whatever seeds 0 and 4 say."""
    first = one_comparison(0.9, {0: (0.9, 0.1), 1: (0.81, 0.8), 2: (0.61, 0.6), 3: (0.71, 0.7)})
    second = one_comparison(0.95, {3: (0.67, 0.7), 2: (0.57, 0.6), 1: (0.77, 0.8), 4: (0.9, 0.1)})
    found = small_table.averaged([first, second], 0.1)
    assert found is not None
    assert found[:2] == pytest.approx((-1.0, 0.1))


def test_a_setting_of_two_seeds_does_not_take_away_the_interval_of_another():
    whole = one_comparison(0.9, dict.fromkeys(range(3), (0.81, 0.8)))
    begun = one_comparison(0.95, dict.fromkeys(range(2), (0.9, 0.8)))
    found = small_table.averaged([whole, begun], 0.1)
    assert found is not None
    assert found[:2] == pytest.approx((1.0, 0.1))
    alone = small_table.averaged([begun], 0.1)
    assert alone is not None
    assert alone.mean == pytest.approx(10.0)
    assert small_table.averaged([], 0.1) is None
    apart = [one_comparison(s, {seed: (0.9, 0.8)}) for s, seed in ((0.9, 0), (0.95, 1))]
    assert small_table.averaged(apart, 0.1) is None


@pytest.mark.parametrize(
    ("rates", "said"), [((0.1,), "learning rate 0.1"), ((0.1, 0.2), "each way to train at its best rate")]
)
def test_the_picture_tells_if_rates_were_searched(rates, said):
    experiment = replace(TINY, rates=dict.fromkeys(TINY.models, rates))
    held_out = {("sgd", 0.2): 0.9, ("eq12", 0.1): 0.9}
    best = {"held_out_accuracy": lambda case: held_out.get((case["optimizer"], case["lr"]), 0.5)}
    rows = made_up(experiment, lambda case: 0.8, **best)
    figure = Figure()
    experiment.draw(rows, figure)
    assert figure.legends[0].get_title().get_text().endswith(f"); {said}")
    assert ("learning rates were not searched" in experiment.table(rows)) == (len(rates) == 1)


def test_the_picture_has_all_remedies_and_the_neurons_that_died():
    experiment = replace(TINY, searching=3, sparsities=(0.95, 0.9))
    figure = Figure()
    experiment.draw(made_up(experiment, lambda case: 0.8), figure)
    assert [axes.get_ylabel() for axes in figure.axes[::4]] == ["sparsity 0.95", "sparsity 0.9"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        *(remedy.label for remedy in small_table.REMEDIES.values()),
        "dead, masked SGD",
        "dead, Eq. 12",
    ]
    to_sgd, to_eq12, adds, dead = figure.axes[:4]
    assert [len(axes.containers) for axes in (to_sgd, to_eq12, adds)] == [4, 4, 5]
    assert len({axes.get_xlim() for axes in (to_sgd, to_eq12, adds)}) == 1
    assert {axes.get_xscale() for axes in figure.axes} == {"linear"}
    shares = [float(np.asarray(line.get_xdata(), dtype=float)[0]) for line in dead.lines]
    assert shares == pytest.approx([10, 0, 0, 0, 0] * 2)  # masked SGD, then Eq. 12
