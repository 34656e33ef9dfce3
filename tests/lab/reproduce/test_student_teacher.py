"""Appendix A.1: the flow's equations, Lemmas A.1 and A.3, Observation A.2, Corollary A.4; figures 6 to 9."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from scipy.integrate import quad

from sparseopt_kernels.lab.reproduce.balance import Balance
from sparseopt_kernels.lab.reproduce.catalogue import EXPERIMENTS
from sparseopt_kernels.lab.reproduce.experiment import Settings
from sparseopt_kernels.lab.reproduce.one_neuron import OneNeuron
from sparseopt_kernels.lab.reproduce.results import Results
from sparseopt_kernels.lab.reproduce.runner import measure_all
from sparseopt_kernels.lab.reproduce.student_teacher import (
    BN_EPS,
    Method,
    Point,
    Students,
    angles,
    balance,
    losses_of,
    new_tasks,
    potential,
    radius_on_curve,
    trajectory,
)
from sparseopt_kernels.lab.reproduce.trajectory_rows import kept_steps, rows_of, trajectories
from sparseopt_kernels.lab.reproduce.two_neurons import TwoNeurons

RIGHT = torch.tensor([[True] * 2 + [False] * 8])
ALL = torch.ones(1, 10, dtype=torch.bool)
BOTH = torch.cat([~RIGHT, RIGHT])
METHODS = [(alpha, correction) for alpha in (0.0, 4.0) for correction in ("none", "unnormalized", "layer")]


def points_of(method, steps, seeds=range(4), mask=RIGHT, a=-1.0):
    tasks = new_tasks(seeds, len(mask))
    students = Students(0.5 * tasks.weights, torch.full_like(tasks.weights[..., 0], a))
    return list(trajectory(students, mask, tasks, method, steps))


def balances(points, alpha):
    return torch.stack([balance(p.a, p.gamma, p.beta, alpha) for p in points])


# The flow.


def flow_of_the_paper(point, z, y, alpha):
    """The right-hand sides of A.1 for a student of one neuron, term by term.

    The paper's ``dw`` for gradient flow has ``x_j - mean x`` where its HAM system has ``z_j - mean z``; only
    the second has the dimension of ``w``.
    """
    a, gamma, beta = (float(v[0, 0]) for v in (point.a, point.gamma, point.beta))
    w, m = point.weight[0, 0].numpy(), len(z)
    x = z @ w
    mu, var = x.mean(), ((x - x.mean()) ** 2).mean()
    z_mean = z.mean(axis=0)
    da = dgamma = dbeta = 0.0
    dw = np.zeros_like(w)
    spread = sum((x[i] - mu) * (z[i] - z_mean) for i in range(m))
    for j in range(m):
        x_hat = (x[j] - mu) / math.sqrt(var + BN_EPS)
        y_j = gamma * x_hat + beta
        relu, slope = max(0.0, y_j), float(y_j > 0)
        residual = y[j] - a * relu
        da += residual * relu / m
        dgamma += residual * a * slope * x_hat / m
        dbeta += residual * a * slope / m
        inner = (z[j] - z_mean) / math.sqrt(var + BN_EPS)
        inner = inner - (x[j] - mu) / (m * (var + BN_EPS) ** 1.5) * spread
        dw += residual * a * slope * gamma * inner / m
    return (1 + alpha * abs(a)) * da, dgamma, dbeta, (1 + alpha * np.abs(w)) * dw


def test_the_papers_gradient_flow_is_what_autograd_says():
    point = points_of(Method(0.1), 20, [3], ALL)[-1]
    tasks = new_tasks([3], 1)
    students = Students(point.weight, point.a)
    with torch.no_grad():
        students.gamma.copy_(point.gamma[0])
        students.beta.copy_(point.beta[0])
    da, dgamma, dbeta, dw = flow_of_the_paper(point, tasks.inputs[0].numpy(), tasks.outputs[0].numpy(), 0.0)
    assert abs(float(point.beta[0, 0])) > 0.01  # not at the start, where some terms are zero
    parameters = (students.a, students.gamma, students.beta, students.weight)
    of_a, of_gamma, of_beta, of_w = torch.autograd.grad(losses_of(students, tasks).sum(), parameters)
    assert -of_a.item() == pytest.approx(da, rel=1e-10)
    assert -of_gamma.item() == pytest.approx(dgamma, rel=1e-10)
    assert -of_beta.item() == pytest.approx(dbeta, rel=1e-10)
    assert (-of_w[0]).numpy() == pytest.approx(dw, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 4.0])
def test_a_small_step_is_that_of_the_papers_flow(alpha):
    lr = 1e-7
    before, after = points_of(Method(lr, "none", alpha), 1, [3], ALL, a=-0.7)
    tasks = new_tasks([3], 1)
    flow = flow_of_the_paper(before, tasks.inputs[0].numpy(), tasks.outputs[0].numpy(), alpha)
    for name, expected in zip(("a", "gamma", "beta", "weight"), flow, strict=True):
        moved = ((getattr(after, name) - getattr(before, name)) / lr).flatten().numpy()
        assert moved == pytest.approx(expected, rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("alpha", [0.5, 4.0, 80.0])
@pytest.mark.parametrize("a", [-2.0, -0.1, 0.0, 0.3, 5.0])
def test_the_closed_form_of_lemma_a3_is_the_integral(alpha, a):
    integral, _ = quad(lambda p: p / (1 + alpha * abs(p)), 0, a, epsabs=1e-13)
    assert potential(torch.tensor(a, dtype=torch.float64), alpha).item() == pytest.approx(integral, abs=1e-12)


def test_without_ham_the_potential_is_its_limit():
    a = torch.tensor([-1.5, 0.0, 0.4], dtype=torch.float64)
    assert torch.allclose(potential(a, 0.0), potential(a, 1e-4), rtol=1e-3)


# Lemmas A.1 and A.3.


@pytest.mark.parametrize(("alpha", "correction"), METHODS)
@pytest.mark.parametrize("mask", [RIGHT, ALL, BOTH], ids=["right mask", "dense", "two neurons"])
def test_the_balance_drifts_at_first_order_in_the_learning_rate(alpha, correction, mask):
    drifts = []
    for steps in (25, 50, 100):  # the same time of the flow
        of_points = balances(points_of(Method(1 / steps, correction, alpha), steps, mask=mask), alpha)
        drifts.append((of_points[-1] - of_points[0]).abs())
    for coarse, fine in pairwise(drifts):
        ratio = coarse / fine
        assert ratio.min() > 1.8, ratio
        assert ratio.max() < 2.2, ratio
    assert drifts[-1].max() < 0.02


@pytest.mark.parametrize(("alpha", "other"), [(4.0, 0.0), (0.0, 4.0)])
def test_the_balance_of_the_other_flow_is_none(alpha, other):
    ends = [balances(points_of(Method(1 / steps, "none", alpha), steps), other)[-1] for steps in (50, 100)]
    start = balances(points_of(Method(0.1, "none", alpha), 0), other)[0]
    moved = [(end - start).abs() for end in ends]
    assert moved[1].min() > 0.1
    assert torch.allclose(moved[0], moved[1], rtol=0.1)  # it does not shrink with the learning rate


@pytest.mark.parametrize("alpha", [0.0, 4.0])
def test_observation_a2_scaling_changes_the_step_of_w_only(alpha):
    plain, scaled = (
        points_of(Method(0.1, correction, alpha), 1)[1] for correction in ("none", "unnormalized")
    )
    for name in ("a", "gamma", "beta"):
        assert torch.equal(getattr(plain, name), getattr(scaled, name)), name
    assert not torch.allclose(plain.weight, scaled.weight, rtol=1e-3)


def test_in_a_layer_of_one_neuron_eq_12_does_nothing():
    plain, scaled = (points_of(Method(0.1, correction), 5)[-1] for correction in ("none", "layer"))
    assert torch.equal(plain.weight, scaled.weight)


# Corollary A.4, and what Lemma A.1 implies.


@pytest.mark.parametrize("correction", ["none", "unnormalized"])
@pytest.mark.parametrize(
    ("alpha", "a", "flips"),
    [
        (4.0, -1.0, True),  # balanced
        (4.0, -4.0, False),  # 2 * potential = 1.65 > gamma^2
        (0.0, -1.0, False),  # balanced
        (0.0, -1.3, False),
        # a^2 < gamma^2: the paper's remark on Lemma A.1 has the inequality the other way round; the corollary
        # with alpha = 0 has it right.
        (0.0, -0.5, True),
    ],
)
def test_the_sign_flips_where_the_corollary_lets_it(alpha, a, flips, correction):
    start = torch.tensor(a, dtype=torch.float64)
    assert bool(2 * potential(start, alpha) < 1) == flips
    points = points_of(Method(0.1, correction, alpha), 200, range(6), a=a)
    has_flipped = (torch.stack([point.a for point in points]) > 0).any(dim=0)
    if flips:
        assert has_flipped.sum() >= 3
    else:
        assert not has_flipped.any()


def test_the_flip_is_where_the_closed_form_has_it():
    points = points_of(Method(0.01, "none", 4.0), 300, [4])
    before, after = next((p, q) for p, q in pairwise(points) if p.a < 0 <= q.a)
    level = float(balance(points[0].a, points[0].gamma, points[0].beta, 4.0))
    radius = (after.gamma**2 + after.beta**2).sqrt().item()
    assert radius == pytest.approx(radius_on_curve(torch.zeros(()), level, 4.0).item(), abs=0.01)
    assert radius == pytest.approx(math.sqrt(1 - (4 - math.log(5)) / 8), abs=0.01)
    assert before.step + 1 == after.step


# Students and tasks.


def test_the_teacher_is_found_by_itself():
    tasks = new_tasks([0, 1], 1)
    teachers = Students(3 * tasks.directions[:, None], torch.ones(2, 1, dtype=torch.float64))
    # Not exactly: eps of batch norm counts less for longer weights.
    assert losses_of(teachers, tasks).max() < 1e-10
    assert tasks.directions.norm(dim=1).tolist() == pytest.approx([1, 1])
    assert not tasks.directions[:, 2:].any()
    assert losses_of(Students(tasks.weights, -teachers.a.detach()), tasks).min() > 0.25


@pytest.mark.parametrize("correction", ["unnormalized", "layer"])
def test_students_do_not_know_of_each_other(correction):
    method = Method(0.1, correction, 4.0)
    together = points_of(method, 20, [0, 1, 2], BOTH)[-1]
    alone = points_of(method, 20, [1], BOTH)[-1]
    for name in ("loss", "a", "gamma", "beta", "weight"):
        assert torch.allclose(getattr(together, name)[1], getattr(alone, name)[0], rtol=1e-9), name


def test_masked_weights_stay_zero_and_others_move():
    first, *_, last = points_of(Method(0.1, "layer", 4.0), 5, mask=BOTH)
    assert not last.weight[:, ~BOTH].any()
    assert (last.weight != first.weight)[:, BOTH].all()
    assert [first.step, last.step] == [0, 5]


def point(step=0, loss=1.0, a=-1.0, gamma=1.0, beta=0.0, weight=(1.0, 0.0)):
    one = torch.tensor([[1.0]], dtype=torch.float64)
    return Point(step, loss * one[0], a * one, gamma * one, beta * one, torch.tensor([[weight]]).double())


@pytest.mark.parametrize(
    ("weight", "gamma", "degrees"),
    [((2, 0), 1, 0), ((1, 1), 1, 45), ((-3, 0), 1, 180), ((-3, 0), -1, 0), ((0, 0), 1, 90)],
)
def test_angle_to_the_teacher(weight, gamma, degrees):
    angle = angles(point(gamma=gamma, weight=weight), torch.tensor([[1.0, 0.0]]).double())
    assert angle.item() == pytest.approx(degrees, abs=1e-5)


# Rows.


def test_rows_say_when_the_sign_changed_for_good_and_the_teacher_was_found():
    a = (-1.0, 0.5, -0.5, 0.5, 0.7)
    loss = (1.0, 1.0, 1e-5, 1e-3, 1e-6)
    gamma = (1.0, 1.0, 1.0, 2.0, 1.0)
    points = [point(i, *values) for i, values in enumerate(zip(loss, a, gamma, strict=True))]
    case = {"optimizer": "gd", "correction": "none"}
    rows = rows_of(case, points, [7], ["sparse"], torch.tensor([[1.0, 0.0]]).double(), 4)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["flipped_at"] for row in rows] == [-1, 1, -1, 3, 3]
    assert [row["found_at"] for row in rows] == [-1, -1, 2, 2, 2]
    assert [row["balance"] for row in rows] == pytest.approx([0, -0.75, -0.75, -3.75, -0.51])
    assert [row["drift"] for row in rows] == pytest.approx([0, 0.75, 0.75, 3.75, 3.75])
    assert {(row["seed"], row["neuron"], row["optimizer"]) for row in rows} == {(7, "sparse", "gd")}


@pytest.mark.parametrize("steps", [0, 1, 10, 1000, 10_000])
def test_kept_steps_have_both_ends(steps):
    kept = kept_steps(steps)
    assert kept == sorted(set(kept))
    assert (kept[0], kept[-1]) == (0, steps)
    assert len(kept) <= 50
    assert len(kept) >= min(steps + 1, 11)


# Experiments.

TINY = [
    Balance(steps=6, seeds=(0, 1)),
    OneNeuron("figure8", 0.1, 6, (0.3, 1.0), seeds=(0, 1)),
    TwoNeurons(steps=6, seeds=(0, 1)),
]


def test_all_four_figures_are_in_the_catalogue():
    assert [EXPERIMENTS[f"figure{i}"].source[7] for i in (6, 7, 8, 9)] == ["6", "7", "8", "9"]


@pytest.mark.parametrize("experiment", TINY, ids=lambda experiment: experiment.name)
def test_an_experiment_measures_keeps_and_shows(experiment, tmp_path):
    path = tmp_path / "results.csv"
    results = Results(experiment, path)
    measure_all(results, Settings(), workers=1)
    again = Results(experiment, path)
    rows = again.rows()
    assert not again.missing()
    assert rows == results.rows()
    assert all(list(row) == [*experiment.columns, "commit"] for row in rows)
    neurons = len({row["neuron"] for row in rows})
    assert len(trajectories(rows)) == len(experiment.cases([])) * 2 * neurons
    assert len(rows) == len(trajectories(rows)) * len(kept_steps(6))
    figure = Figure()
    experiment.draw(rows, figure)
    assert all(axes.lines for axes in figure.axes)
    assert any(axes.get_xlabel() for axes in figure.axes)
    assert figure.legends
    lines = experiment.table(rows)
    assert max(map(len, lines)) < 160
    assert any(line.startswith("paper: ") for line in lines)


def test_all_methods_start_alike():
    experiment = OneNeuron("figure8", 0.1, 1, seeds=(0, 1))
    firsts = [
        [row for row in experiment.measure(case, Settings()) if row["step"] == 0]
        for case in experiment.cases([])
    ]
    for own in firsts:
        assert [(r["seed"], r["loss"], r["angle"]) for r in own] == [
            (r["seed"], r["loss"], r["angle"]) for r in firsts[0]
        ]


def row_of(step, seed=0, optimizer="ham", correction="none", **values):
    return {
        **{"init_std": 1.0, "dense_start": -1.0, "optimizer": optimizer, "correction": correction},
        **{"seed": seed, "neuron": "sparse", "step": step, "loss": 0.5, "a": -1.0, "gamma": 1.0, "beta": 0.0},
        **{"angle": 80.0, "balance": -0.5, "drift": 0.0, "flipped_at": -1, "found_at": -1},
        **values,
    }


def test_the_table_counts_flips_teachers_found_and_compares_scaling():
    rows = []
    for optimizer in ("gd", "ham"):
        for correction in ("none", "unnormalized"):
            for seed in (0, 1, 2):
                far = {"angle": 100.0 if seed == 2 else 80.0}
                rows.append(row_of(0, seed, optimizer, correction, **far))
                end = {"flipped_at": 20 + seed, "found_at": 40} if optimizer == "ham" else {}
                if correction == "unnormalized" and end:
                    end["found_at"] = 30 if seed < 2 else -1
                rows.append(row_of(100, seed, optimizer, correction, **far, **end))
    lines = OneNeuron("figure8", 0.1, 100, (1.0,), (0, 1, 2)).table(rows)
    header, plain, scaled = lines[0].split("  "), lines[4].split(), lines[5].split()
    assert header[0] == "method"
    assert plain[:3] == ["HAM,", "not", "scaled"]
    assert plain[4:10] == ["3/3", "21", "3/3", "2/2", "1/1", "40"]
    assert scaled[5:11] == ["3/3", "21", "2/3", "2/2", "0/1", "30"]
    assert lines[2].split()[5:7] == ["0/3", "-"]
    assert "only with scaling 0, only without 1, both 2 (sooner with scaling: 2)" in lines[7]


def test_the_table_of_figure_9_counts_dense_neurons_switched_off():
    rows = []
    for correction in ("none", "unnormalized", "layer"):
        for optimizer in ("gd", "ham"):
            for start in (-1.0, 1.0):
                for neuron in ("dense", "sparse"):
                    own = {"dense_start": start, "neuron": neuron}
                    rows.append(row_of(0, 0, optimizer, correction, **own))
                    off = correction == "layer" and optimizer == "ham" and neuron == "dense"
                    rows.append(row_of(9, 0, optimizer, correction, **own, a=0.01 if off else 0.9))
    lines = TwoNeurons(seeds=(0,)).table(rows)
    assert sum(" 1/1 " in line for line in lines) == 2
    assert "scaled by Eq. 12 or not: dense neuron off only if scaled 2, only if not 0, both 0" in lines[-3]
    assert "scaled by D or not: dense neuron off only if scaled 0" in lines[-4]
