"""The experiment on skew: its cases, its rows, its table and its picture."""

import dataclasses
import math

import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from sparseopt_kernels.lab.reproduce import skew_probe
from sparseopt_kernels.lab.reproduce.catalogue import EXPERIMENTS
from sparseopt_kernels.lab.reproduce.experiment import Settings
from sparseopt_kernels.lab.reproduce.skew import SKEW, average, second_half, select

pytestmark = pytest.mark.usefixtures("one_thread")

FIRST = {"seed": 0, "method": "rigl", "optimizer": "sgd", "weight_decay": 5e-4, "update_every": 25}
OTHERS = {"method": "set", "optimizer": "sparseopt", "weight_decay": 0.0, "update_every": 100}


@pytest.fixture(scope="module")
def tiny(one_thread):
    """The experiment on the digits, and the rows of five cases: one, and those that differ in one thing."""
    # 800 images in batches of 100: 200 steps, two periods.
    experiment = dataclasses.replace(
        SKEW, data="digits", examples=(800, 100), epochs=25, seeds=(0,), batch_size=100
    )
    cases = [FIRST, *({**FIRST, key: value} for key, value in OTHERS.items())]
    return experiment, [row for case in cases for row in experiment.measure(case, Settings())]


def test_cases_are_all_combinations():
    cases = dataclasses.replace(SKEW, seeds=(0, 7)).cases([])
    assert len({tuple(case[k] for k in SKEW.key) for case in cases}) == len(cases) == 2 * 2 * 2 * 2 * 2
    for key, value in OTHERS.items():
        assert {case[key] for case in cases} == {FIRST[key], value}
    assert {case["seed"] for case in cases} == {0, 7}


@pytest.mark.slow
class TestExperiment:
    def test_rows_are_of_the_columns(self, tiny):
        experiment, rows = tiny
        assert len(rows) == 5 * 3 * 2  # layers, periods
        for row in rows:
            assert list(row) == list(experiment.columns)
            assert {k: type(v) for k, v in row.items()} == dict(experiment.columns)

    @pytest.mark.parametrize("key", OTHERS)
    def test_a_case_is_measured_as_it_says(self, tiny, key):
        _, rows = tiny
        first, other = (select(rows, **{**FIRST, key: value}) for value in (FIRST[key], OTHERS[key]))
        assert average(first, "turn") != average(other, "turn")
        predicted = average(other, "turn_predicted")
        assert (predicted == 0) is (key == "weight_decay")

    def test_masks_that_have_come_to_rest_have_no_updates(self, tiny):
        _, rows = tiny
        # The last update is that of step 100, or 125: before three quarters of 200 steps. What is seen of it
        # with the next step belongs to the second period.
        for row in rows:
            ended = row["update_every"] == 100
            assert math.isnan(row["same_batch_raw"]) is (ended and row["step"] == 200)
            assert math.isnan(row["update_raw"]) is (ended and row["step"] == 100)

    def test_table_and_picture(self, tiny):
        experiment, rows = tiny
        table = experiment.table(rows)
        mean = average(select(rows, method="set"), "same_batch_raw")
        line = next(line for line in table if line.startswith("SET every 25, masked SGD"))
        assert f"{mean:.1f}" in line.split()
        assert sum("RigL every 25, SparseOpt" in line for line in table) == 2  # of angles, of neurons
        figure = Figure()
        experiment.draw(rows, figure)
        heights = [bar.get_height() for bar in figure.axes[1].patches if isinstance(bar, Rectangle)]
        expected = average(select(rows, optimizer="sgd", method="rigl", update_every=25), "same_batch_raw")
        assert heights[0] == pytest.approx(expected)
        assert len(heights) == 16


def test_the_experiment_is_in_the_catalogue():
    assert EXPERIMENTS["skew"] is SKEW


def test_selection_and_averages():
    rows = [
        {"a": 1, "x": 2.0, "step": 100},
        {"a": 1, "x": 4.0, "step": 200},
        {"a": 2, "x": math.nan, "step": 200},
    ]
    assert [row["x"] for row in select(rows, a=1)] == [2.0, 4.0]
    assert average(rows, "x") == 3.0
    assert math.isnan(average(select(rows, a=2), "x"))
    assert [row["step"] for row in second_half(rows)] == [200, 200]


def test_windows_and_periods_fit_together():
    assert skew_probe.PERIOD % skew_probe.WINDOW == 0
