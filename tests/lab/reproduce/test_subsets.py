"""Tables and pictures of a part of the rows, as ``--only`` leaves them: they say what is there, and how much
is missing.
"""

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from result_rows import committed, made_up

from sparseopt_kernels.lab.reproduce.catalogue import EXPERIMENTS
from sparseopt_kernels.lab.reproduce.one_neuron import OneNeuron
from sparseopt_kernels.lab.reproduce.table_text import (
    WIDTH,
    mean_and_spread,
    seeds_of,
    still_missing,
    wrapped,
)
from sparseopt_kernels.lab.reproduce.two_neurons import TwoNeurons


def subsets(experiment, rows):
    yield "no row", []
    yield "the first row", rows[:1]
    yield "the last row", rows[-1:]
    yield "every other row", rows[::2]
    if "seed" in experiment.columns:
        yield "one seed", [row for row in rows if row["seed"] == rows[-1]["seed"]]
    for column in experiment.key:
        own = [row for row in rows if row[column] == rows[0][column]]
        if 1 < len(own) < len(rows):
            yield column, own


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.filterwarnings("error")
def test_any_part_of_the_rows_is_tabulated_and_drawn(name):
    experiment = EXPERIMENTS[name]
    rows = committed(experiment) or made_up(experiment)
    for about, own in subsets(experiment, rows):
        lines = experiment.table(own)
        assert " nan" not in "\n".join(lines), about
        missing = still_missing(experiment, own)
        assert bool(missing) == (len(cases_of(experiment, own)) < len(experiment.cases(own))), about
        assert set(missing) <= set(lines), about
        figure = Figure(layout="constrained")
        experiment.draw(own, figure)
        assert all(said in figure.get_suptitle() for said in missing), about
        if about == "the first row":
            FigureCanvasAgg(figure).draw()


def cases_of(experiment, rows):
    cases = [tuple(case.values()) for case in experiment.cases(rows)]
    return {key for row in rows if (key := tuple(row[name] for name in experiment.key)) in cases}


GROWING = ("small", "appendixF", "resnet20")
"""Those that take hours: what is committed of them may be a part."""


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_nothing_is_missing_from_all_rows(name):
    experiment = EXPERIMENTS[name]
    rows = [] if name in GROWING else committed(experiment)
    assert still_missing(experiment, rows or made_up(experiment)) == []


def of_figure_7(optimizer, correction, seed, found_at):
    return {
        **{
            "init_std": 1.0,
            "optimizer": optimizer,
            "correction": correction,
            "seed": seed,
            "neuron": "sparse",
        },
        **{"step": 100, "loss": 0.5, "a": -1.0, "gamma": 1.0, "beta": 0.0, "angle": 80.0, "balance": -0.5},
        **{"drift": 0.0, "flipped_at": -1, "found_at": found_at},
    }


def test_scaling_is_compared_on_starts_that_have_both():
    """A run that was not made has not missed the teacher."""
    experiment = OneNeuron("figure8", 0.1, 100, (1.0,), (0, 1))
    scaled = [of_figure_7("ham", "unnormalized", seed, found_at=30) for seed in (0, 1)]
    assert not any("the same starts" in line for line in experiment.table(scaled))
    lines = experiment.table([*scaled, of_figure_7("ham", "none", 1, found_at=-1)])
    assert any("only with scaling 1, only without 0, both 0" in line for line in lines)
    assert "2 of 4 runs are still to be made" in lines


def test_scaling_of_two_neurons_is_compared_on_starts_that_have_both():
    rows = [
        {**of_figure_7("ham", correction, seed, -1), "dense_start": start, "neuron": "dense", "a": 0.0}
        for correction, seed, start in (("layer", 0, 1.0), ("layer", 0, -1.0), ("none", 0, 1.0))
    ]
    lines = TwoNeurons(seeds=(0,)).table(rows)
    compared = [line for line in lines if "the same starts" in line]
    assert len(compared) == 1
    assert compared[0].endswith(
        "scaled by Eq. 12 or not: dense neuron off only if scaled 0, only if not 0, both 1"
    )


@pytest.mark.parametrize(("name", "optimizer"), [("figure7", "ham"), ("figure9", "gd")])
def test_runs_are_seen_whole_beside_panels_without_any(name, optimizer):
    experiment = EXPERIMENTS[name]
    rows = [row for row in committed(experiment) if row["optimizer"] == optimizer]
    figure = Figure()
    experiment.draw([row for row in rows if row["correction"] == "unnormalized"], figure)
    assert {axes.get_xlim() for axes in figure.axes if axes.lines} == {figure.axes[0].get_xlim()}
    assert figure.axes[0].get_xlim()[1] >= max(row["step"] for row in rows)


def test_what_is_counted_is_what_is_there():
    """Ten seeds are asked for, three are there."""
    experiment = EXPERIMENTS["figure2"]
    rows = [row for row in committed(experiment) if row["seed"] < 3 and row["norm"] == "batch"]
    lines = experiment.table(rows)
    assert "(mean ± standard deviation over 3 seeds)" in lines
    assert "17 of 20 runs are still to be made" in lines
    assert not any(line.startswith("without batch norm") for line in lines)
    figure = Figure()
    experiment.draw(rows, figure)
    assert "without batch norm" not in figure.get_suptitle()
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert labels == ["theory: 1/√(1 - s)", "measured, with batch norm"]


def test_means_and_notes():
    assert mean_and_spread([]) == "-"
    assert mean_and_spread([1.0], 2) == "1.00"
    assert mean_and_spread([1.0, 3.0]) == "2.000 ± 1.414"
    assert [seeds_of([{"seed": seed} for seed in seeds]) for seeds in ([], [3, 3], [0, 1])] == [
        "0 seeds",
        "one seed",
        "2 seeds",
    ]
    lines = wrapped("word " * 100)
    assert max(map(len, lines)) <= WIDTH
    assert " ".join(lines).split() == ["word"] * 100
