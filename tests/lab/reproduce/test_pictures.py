"""The committed pictures, drawn again from their rows: texts can be read, legends cover no data, axes say if
they are not linear. And titles say what the rows say, of other rows something else.
"""

from __future__ import annotations

import math
import re
from itertools import combinations

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from result_rows import committed as rows_of
from result_rows import made_up

from sparseopt_kernels.lab.reproduce.catalogue import EXPERIMENTS
from sparseopt_kernels.lab.reproduce.picture_titles import beyond_noise, draw_title, only_with
from sparseopt_kernels.lab.reproduce.tables_picture import Curve, draw_table
from sparseopt_kernels.lab.training.plots import STYLE

Panels = dict[tuple[str, float], dict[str, Curve]]
NAMES = ["figure2", *(f"figure{i}" for i in range(5, 11)), "layernorm", "skew", "prediction"]
OF_REMEDIES = ["small", "appendixF", "resnet20"]
"""Their rows may be not committed yet, or of before remedies: then made-up rows alone are drawn."""


def committed(name):
    rows = rows_of(EXPERIMENTS[name])
    if not rows:
        pytest.skip(f"docs/results has no rows of {name} with the columns {', '.join(EXPERIMENTS[name].key)}")
    return rows


def drawn(draw):
    """The figure, as the command draws it."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.5), layout="constrained", dpi=130)
        FigureCanvasAgg(figure)
        draw(figure)
        figure.canvas.draw()
    return figure


def title_of(name, rows):
    figure = Figure(figsize=(8, 4.5))
    EXPERIMENTS[name].draw(rows, figure)
    return " ".join(figure.get_suptitle().split())


def is_seen(text):
    return text.get_visible() and text.get_text().strip()


def texts(figure):
    """All that are seen, by what they say; labels of ticks outside of an axis are not."""
    of_ticks, seen = set(), []
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                of_ticks |= {tick.label1, tick.label2}
                if low <= tick.get_loc() <= high:
                    seen.append(tick.label1)
    seen += [text for text in figure.findobj(Text) if text not in of_ticks]
    return [text for text in seen if is_seen(text)]


def assert_readable(figure):
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts(figure)]
    for said, box in boxes:
        assert box.x0 >= 0, f"{said!r} is cut"
        assert box.y0 >= 0, f"{said!r} is cut"
        assert box.x1 <= figure.bbox.x1, f"{said!r} is cut"
        assert box.y1 <= figure.bbox.y1, f"{said!r} is cut"
    for (said, box), (other, other_box) in combinations(boxes, 2):
        # Letters of neighbours may touch: boxes are taller than what is in them.
        assert not box.padded(-1.5).overlaps(other_box), f"{said!r} and {other!r} are on one another"


def assert_legends_cover_nothing(figure):
    for axes in figure.axes:
        if axes.get_legend() is None:
            continue
        box = axes.get_legend().get_window_extent()
        for line in axes.lines:
            places = np.array(line.get_xydata(), dtype=float)
            points = line.get_transform().transform(places)
            assert not any(box.contains(x, y) for x, y in points), f"the legend of {axes} covers {line}"
        for patch in axes.patches:
            assert not box.overlaps(patch.get_window_extent()), f"the legend of {axes} covers {patch}"


def assert_axes_say_what_they_are(figure):
    for axes in figure.axes:
        for which, shared in (("x", axes.get_shared_x_axes()), ("y", axes.get_shared_y_axes())):
            labels = [getattr(own, f"get_{which}label")() for own in shared.get_siblings(axes)]
            assert any(labels), f"{axes} has no label of its {which} axis"
            if getattr(axes, f"get_{which}scale")() != "linear":
                assert any("log" in label for label in labels), (
                    f"{axes} does not say that {which} is not linear"
                )


def assert_it_can_be_read(name, rows):
    figure = drawn(lambda figure: EXPERIMENTS[name].draw(rows, figure))
    assert_readable(figure)
    assert_legends_cover_nothing(figure)
    assert_axes_say_what_they_are(figure)
    assert figure.get_suptitle()
    assert figure.get_size_inches()[0] == 8


class TestCommittedPictures:
    @pytest.mark.parametrize("name", [*NAMES, *OF_REMEDIES])
    def test_it_can_be_read(self, name):
        assert_it_can_be_read(name, committed(name))

    @pytest.mark.parametrize("seeds", [5, 2])
    @pytest.mark.parametrize("name", OF_REMEDIES)
    def test_it_can_be_read_of_made_up_rows_and_of_a_part_of_them(self, name, seeds):
        rows = [row for row in made_up(EXPERIMENTS[name]) if row["seed"] < seeds]
        assert_it_can_be_read(name, rows)

    @pytest.mark.parametrize("name", OF_REMEDIES)
    def test_a_table_fits_the_screen(self, name):
        experiment = EXPERIMENTS[name]
        assert max(map(len, experiment.table(rows_of(experiment) or made_up(experiment)))) <= 120

    def test_faults_are_found(self):
        def cut(figure):
            figure.text(0.99, 0.5, "a text that leaves the figure")

        def crowded(figure):
            figure.text(0.5, 0.5, "one")
            figure.text(0.5, 0.5, "other")

        def covered(figure):
            axes = figure.subplots()
            axes.plot([0, 1], [0, 1], label="a line")
            axes.legend(loc="upper right")

        def logarithmic(figure):
            axes = figure.subplots()
            axes.set(xscale="log", xlabel="step", ylabel="loss")

        with pytest.raises(AssertionError, match="is cut"):
            assert_readable(drawn(cut))
        with pytest.raises(AssertionError, match="on one another"):
            assert_readable(drawn(crowded))
        with pytest.raises(AssertionError, match="covers"):
            assert_legends_cover_nothing(drawn(covered))
        with pytest.raises(AssertionError, match="not linear"):
            assert_axes_say_what_they_are(drawn(logarithmic))


class TestSentences:
    def test_what_happens_with_one_with_several_and_with_none(self):
        say = {"statement": "the neuron dies", "inverted": "does the neuron die"}
        both = {"Adam": [True, False, False], "SGD": [True]}
        assert only_with(both, **say) == "the neuron dies in 1 of 3 runs with Adam, in 1 of 1 runs with SGD"
        one = {"Adam": [True, False], "SGD": [False]}
        assert only_with(one, **say) == "only with Adam does the neuron die: in 1 of 2 runs"
        assert only_with({"Adam": [False], "SGD": [False]}, **say) == "in no run does the neuron die"
        alone = {"Adam": [True, False], "SGD": []}
        assert only_with(alone, **say) == "the neuron dies in 1 of 2 runs with Adam"

    def test_settings_beyond_noise_are_counted(self):
        results = [(1.0, 0.5), (-1.0, 0.5), (0.4, 0.5), (2.0, 1.0), (1.0, math.nan), (0.1 + 0.2, 0.3)]
        assert beyond_noise(results, "better", "worse") == "better in 2 and worse in 1 of 6"
        assert beyond_noise(results[:1], "better", "worse") == "better in 1 of 1"
        assert beyond_noise(results[2:3], "better", "worse") == "neither better nor worse in any of 1"

    def test_a_title_begins_with_a_capital_and_keeps_to_the_page(self):
        figure = Figure()
        draw_title(figure, "a word of HAM " * 10, "then this")
        lines = figure.get_suptitle().splitlines()
        assert lines[0].startswith("A word of HAM")
        assert lines[-1] == "then this"
        assert max(map(len, lines)) <= 84


def changed(rows, of=lambda row: True, **values):
    """The rows, with these values in those that ``of`` names; a function makes its value of the row."""

    def of_row(row):
        return {name: new(row) if callable(new) else new for name, new in values.items()}

    return [{**row, **of_row(row)} if of(row) else row for row in rows]


def power_of_density(exponent):
    return lambda row: (1 - row["sparsity"]) ** exponent


class TestTitlesFollowTheNumbers:
    """Of committed rows in which the columns that a title is of are made up."""

    def test_figure_2(self):
        exact = changed(committed("figure2"), ratio=power_of_density(-0.5))
        assert title_of("figure2", exact) == (
            "Gradients are off Eq. 11 by at most 0.0% with batch norm, 0.0% without batch norm"
        )
        off = changed(exact, lambda row: row["norm"] == "none", ratio=lambda row: 1.5 * row["ratio"])
        assert title_of("figure2", off).endswith("0.0% with batch norm, 50.0% without batch norm")

    @pytest.mark.parametrize("name", ["figure6", "figure7", "figure8"])
    def test_the_outer_weight_crosses_zero_with_one_with_both_or_with_none(self, name):
        none = changed(committed(name), flipped_at=-1)
        assert title_of(name, none).startswith("In no run does the outer weight cross zero")
        ham = changed(none, lambda row: row["optimizer"] == "ham" and row["seed"] == 0, flipped_at=3)
        count = 12 if name == "figure6" else 40
        said = f"Only with HAM does the outer weight cross zero: in 2 of {count} runs"
        assert title_of(name, ham).startswith(said)
        both = changed(ham, lambda row: row["optimizer"] == "gd", flipped_at=1)
        assert title_of(name, both).startswith(
            f"The outer weight crosses zero in {count} of {count} runs with gradient descent, "
            f"in 2 of {count} runs with HAM"
        )

    def test_only_with_ham_does_the_outer_weight_cross_zero(self):
        assert title_of("figure6", committed("figure6")).startswith(
            "Only with HAM does the outer weight cross zero: in "
        )

    def test_figure_7_says_with_what_the_teacher_is_found(self):
        rows = changed(committed("figure7"), found_at=-1)
        assert title_of("figure7", rows).endswith("; in no run is the teacher found")
        found = changed(rows, lambda row: row["optimizer"] == "gd", found_at=5)
        said = title_of("figure7", found)
        assert said.endswith("; only with gradient descent is the teacher found: in 40 of 40 runs")

    def test_figure_9(self):
        on = changed(committed("figure9"), a=1.0)
        assert title_of("figure9", on) == (
            "In no run is the dense neuron switched off, 0 not scaled, 0 scaled by D, 0 scaled by Eq. 12"
        )
        off = changed(on, lambda row: (row["optimizer"], row["correction"]) == ("ham", "layer"), a=0.01)
        assert title_of("figure9", off) == (
            "Only with HAM is the dense neuron switched off: in 40 of 120 runs, "
            "0 not scaled, 0 scaled by D, 40 scaled by Eq. 12"
        )

    def test_figure_5(self):
        alike = changed(committed("figure5"), exploration_rate=lambda row: 0.5 + 0.01 * row["seed"])
        rows = changed(alike, lambda row: row["regrow"] == "corrected", exploration_rate=0.9)
        by_g = "grown by g, neither more weights nor fewer weights in any of 4 settings"
        assert title_of("figure5", rows) == (
            f"Against masked SGD, RigL grown by c g tries more weights in 4 of 4 settings; {by_g}"
        )
        one = changed(
            alike, lambda row: row["regrow"] == "corrected" and row["sparsity"] == 0.9, exploration_rate=0
        )
        assert title_of("figure5", one) == (
            f"Against masked SGD, RigL grown by c g tries fewer weights in 1 of 4 settings; {by_g}"
        )

    def test_layernorm(self):
        rows = changed(committed("layernorm"), ratio=power_of_density(-0.5))
        rows = changed(rows, lambda row: row["norm"] == "layer", ratio=2.5)
        each = "scales each neuron's gradient by its own sparsity"
        alike = "scales all gradients of a layer alike"
        assert title_of("layernorm", rows) == f"Batch norm {each}; layer norm {alike}"
        other = changed(rows, lambda row: row["norm"] == "layer", ratio=power_of_density(-0.3))
        neither = "scales each neuron's gradient by 1 - sᵢ to the power of -0.30"
        assert title_of("layernorm", other) == f"Batch norm {each}; layer norm {neither}"

    def test_skew(self):
        rows = changed(committed("skew"), same_batch_raw=10.0, same_batch_corrected=20.0)
        runs = len({tuple(row[column] for column in EXPERIMENTS["skew"].key) for row in rows})
        assert title_of("skew", rows).endswith(f"than if it is not (g): in {runs} of {runs} runs")
        rigl = changed(rows, lambda row: row["method"] == "rigl", same_batch_raw=30.0)
        assert title_of("skew", rigl).endswith(f"than if it is not (g): in {runs // 2} of {runs} runs")

    def test_panels_of_skew(self):
        figure = Figure()
        rows = changed(committed("skew"), c_largest=lambda row: 9.0 if row["method"] == "set" else 1.0)
        EXPERIMENTS["skew"].draw(changed(rows, same_batch_raw=3.0, same_batch_corrected=7.0), figure)
        assert figure.axes[1].get_title(loc="left") == "one batch, old and new mask: 3° to 7°"
        assert figure.axes[3].get_title(loc="left") == "largest c_i: up to 9, with SET, masked SGD"

    def test_prediction(self):
        times = ("quarter_epoch", "half_epoch", "first_epoch", "test_accuracy")
        alike = changed(committed("prediction"), **dict.fromkeys(times, 0.5))
        rows = changed(alike, lambda row: row["optimizer"] == "eq12", half_epoch=0.4, test_accuracy=0.7)
        said = title_of("prediction", rows)
        assert said.startswith("Settings that differ from masked SGD beyond noise: Eq. 12: worse in ")
        assert re.search(r"Eq. 12: worse in (\d+) of \1 at ½ epoch, better in \1 of \1 at the end", said)
        assert "norm(w) / rms: neither better nor worse in any of" in said

    def test_a_table(self):
        ours: dict[int, list[float]] = {100: [60.0, 62.0], 200: []}
        base = {100: [58.0, 59.0], 200: [61.0]}
        paper, paper_base = {100: 61.5, 200: 64.0}, {100: 60.0}
        panels: Panels = {("rigl", 0.9): {"SparseOpt": (ours, paper), "SGD": (base, paper_base)}}
        figure = drawn(lambda figure: draw_table(figure, "Table 0: invented", panels))
        assert figure.get_suptitle().splitlines() == [
            "Table 0: invented.",
            "Points above SGD here (in the paper): SparseOpt +2.5 (+1.5)",
        ]
        assert_readable(figure)
        assert_axes_say_what_they_are(figure)

    def test_a_table_of_methods_that_the_paper_has_not_and_one_with_nothing_to_compare(self):
        nothing: Panels = {("set", 0.9): {"SparseOpt": ({100: [60.0]}, {}), "SGD": ({100: []}, {100: 60.0})}}
        figure = drawn(lambda figure: draw_table(figure, "Table 0", nothing))
        assert figure.get_suptitle().endswith("Nothing is measured yet that can be compared with SGD")
        other: Panels = {("set", 0.9): {"scalar": ({100: [61.0]}, {}), "SGD": ({100: [60.0]}, {100: 60.0})}}
        figure = drawn(lambda figure: draw_table(figure, "Table 0", other))
        assert figure.get_suptitle().endswith("(in the paper): scalar +1.0")
