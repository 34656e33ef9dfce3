"""Experiments that search learning rates: what is chosen by what, and runs on a few real images."""

import math
from typing import Any

import pytest
import torch

from sparseopt_kernels import RigL
from sparseopt_kernels.lab.reproduce import small_table
from sparseopt_kernels.lab.reproduce.cli import _png
from sparseopt_kernels.lab.reproduce.experiment import Settings
from sparseopt_kernels.lab.reproduce.prediction import Prediction, draw_fan_in, row_counts, scale_by_norm
from sparseopt_kernels.lab.reproduce.resnet20 import RESNET20
from sparseopt_kernels.lab.reproduce.results import Results
from sparseopt_kernels.lab.reproduce.runner import measure_all
from sparseopt_kernels.lab.reproduce.searched import Search, Setting, images, measured
from sparseopt_kernels.lab.reproduce.small import Small
from sparseopt_kernels.lab.training.config import Config
from sparseopt_kernels.lab.training.data import load_dataset
from sparseopt_kernels.lab.training.paired import holm, paired
from sparseopt_kernels.lab.training.run import Run

DIGITS: dict[str, Any] = {
    "data": "digits",
    "train_images": 640,
    "held_out_images": 200,
    "test_images": 600,
    "epochs": 2,
}
SETTINGS: list[Setting] = [{"model": "mlp", "optimizer": "sgd"}, {"model": "mlp", "optimizer": "eq12"}]


TINY_SMALL = Small(
    models=("mlp",),
    methods=("rigl",),
    sparsities=(0.9,),
    seeds=(0, 1, 2),
    searching=1,
    update_every=4,
    **DIGITS,
)
TINY_PREDICTION = Prediction(
    weight_decays=(0.0,), updates=(0, 4), fan_ins=("wide",), rates=(0.1, 0.3), seeds=(0, 1, 2), **DIGITS
)


def search(seeds=(0, 1, 2), searching=2):
    return Search(SETTINGS, lambda setting: (0.1, 0.3), seeds, searching)


def row(optimizer, lr, seed, held_out, test=0.5):
    return {
        "model": "mlp",
        "optimizer": optimizer,
        "lr": lr,
        "seed": seed,
        "held_out_accuracy": held_out,
        "test_accuracy": test,
    }


def tiny_config(**given):
    values = {
        "epochs": 2,
        "batch_size": 64,
        "warmup_epochs": 1,
        "update_every": 4,
        "threads": 1,
        "device": "cpu",
    }
    return Config(**{**values, "distribution": "uniform", "sparsity": 0.9, "backend": "reference", **given})


def test_the_rate_is_best_on_held_out_and_not_on_test_images():
    rows = [row("sgd", 0.1, s, 0.8, test=0.7) for s in (0, 1)]
    rows += [row("sgd", 0.3, s, 0.7, test=0.9) for s in (0, 1)]
    assert search().best_rates(rows) == {("mlp", "sgd"): 0.1}
    assert set(search().at_best_rate(rows)[("mlp", "sgd")]) == {0, 1}


def test_a_rate_that_diverged_once_is_not_chosen():
    rows = [row("sgd", 0.1, s, 0.2) for s in (0, 1)]
    rows += [row("sgd", 0.3, 0, 0.9), row("sgd", 0.3, 1, math.nan)]
    assert search().best_rates(rows) == {("mlp", "sgd"): 0.1}
    for diverged in rows:
        diverged["held_out_accuracy"] = math.nan
    assert search().best_rates(rows) == {}


def test_later_seeds_do_not_change_the_rate():
    rows = [row("sgd", lr, s, lr) for lr in (0.1, 0.3) for s in (0, 1)]
    rows.append(row("sgd", 0.3, 2, 0.0))
    assert search().best_rates(rows) == {("mlp", "sgd"): 0.3}


def test_cases_grow_when_the_search_of_a_setting_is_complete():
    first = search().cases([])
    assert len(first) == 2 * 2 * 2
    assert [case["seed"] for case in first] == [0] * 4 + [1] * 4
    rows = [{**case, "held_out_accuracy": case["lr"], "test_accuracy": 0.5} for case in first]
    incomplete = [r for r in rows if (r["optimizer"], r["lr"], r["seed"]) != ("eq12", 0.1, 1)]
    assert search().cases(incomplete) == [*first, {**SETTINGS[0], "lr": 0.3, "seed": 2}]
    assert len(search().cases(rows)) == 10


def test_cases_of_the_experiment_take_turns():
    cases = Small().cases([])
    assert len(cases) == 3 * 3 * (5 + 2 + 1) * 2 * 5 * 2  # networks, sparsities, remedies of each method
    assert {case["seed"] for case in cases[: len(cases) // 2]} == {0}
    # RigL at 0.99 on the MLP first, with each remedy and either optimizer at five rates.
    first = [(case["method"], case["model"], case["sparsity"]) for case in cases[:50]]
    assert first == [("rigl", "mlp", 0.99)] * 50
    assert [case["method"] for case in cases[: len(cases) // 2]] == (
        ["rigl"] * 3 * 3 * 5 * 10 + ["set"] * 3 * 3 * 2 * 10 + ["static"] * 3 * 3 * 10
    )


def test_a_remedy_is_what_it_says():
    """The limit of the optimizer, whether updates of the masks cost a step, the inputs that neurons keep."""
    found = {}
    for remedy in small_table.REMEDIES:
        case = {"model": "mlp", "method": "rigl", "sparsity": 0.9, "optimizer": "eq12", "remedy": remedy}
        run = TINY_SMALL._run({**case, "lr": 0.1, "seed": 0}, Settings())
        assert run.topology is not None
        (group,) = run.optimizer.param_groups
        assert group["correction"] == "layer"
        found[remedy] = (group["max_grad_norm"], run.topology.skip_step, run.topology.min_fan_in)
    assert found == {
        "none": (None, False, 0),
        "clip": (1.0, False, 0),
        "skip": (None, True, 0),
        "both": (1.0, True, 0),
        "alive": (None, False, 1),
    }


def test_the_deeper_network_has_one_rate_and_all_seeds_follow():
    first = RESNET20.cases([])
    assert len(first) == 2 * 2 * 3 * 2
    assert {case["lr"] for case in first} == {0.1}
    rows = [{**case, "held_out_accuracy": 0.5, "test_accuracy": 0.5} for case in first]
    assert len(RESNET20.cases(rows)) == 5 * len(first)


def test_interval_of_a_hand_made_example():
    # Mean 2, standard deviation 1, three pairs: 4.3027 * 1 / sqrt(3); t = 3.4641, two-sided p = 0.0742.
    result = paired([1.0, 2.0, 3.0], resolution=0.01)
    assert result.mean == 2.0
    assert result.half_width == pytest.approx(2.4841, abs=1e-4)
    assert result.p_value == pytest.approx(0.0742, abs=1e-4)
    assert not result.beyond_noise
    assert paired([-2.0, -2.1, -1.9], resolution=0.01).beyond_noise


def test_equal_differences_are_as_unsure_as_their_resolution():
    result = paired([0.1, 0.1, 0.1], resolution=0.1)
    assert result.half_width == 0.1
    assert result.p_value == pytest.approx(0.05)
    assert not result.beyond_noise


@pytest.mark.parametrize("differences", [[1.0, 2.0], [1.0, math.nan, 2.0]])
def test_no_interval_without_enough_pairs_that_did_not_diverge(differences):
    result = paired(differences, resolution=0.1)
    assert math.isnan(result.half_width)
    assert math.isnan(result.p_value)
    assert not result.beyond_noise


def test_holm_of_a_printed_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]


@pytest.mark.parametrize("wide", [False, True])
def test_masks_of_a_drawn_fan_in_keep_their_number_of_weights(wide):
    run = Run(tiny_config(), load_dataset("digits"), "sgd", seed=3)
    before = {name: int(run.masks[p].count_nonzero()) for name, p in run.masks.named().items()}
    draw_fan_in(run, wide=wide)
    for name, p in run.masks.named().items():
        mask = run.masks[p]
        assert int(mask.count_nonzero()) == before[name]
        assert torch.equal(p != 0, mask)  # what became active has its initial value, the rest is zero
        counts = mask.flatten(1).sum(dim=1)
        if wide and name != "classifier.weight":
            assert int(counts.max()) == pytest.approx(4 * before[name] / len(mask), abs=1)
            assert int((counts == counts.max()).sum()) == round(0.1 * len(mask))
        else:
            assert int(counts.max() - counts.min()) <= 1


def test_wide_rows_are_never_longer_than_there_are_weights():
    mask = torch.zeros(20, 10, dtype=torch.bool)
    mask[:, :8] = True
    counts = row_counts(mask, wide=True, random=torch.Generator().manual_seed(0))
    assert int(counts.max()) == 10
    assert int(counts.sum()) == 160


def test_scaling_by_norm_of_rows():
    run = Run(tiny_config(), load_dataset("digits"), "sgd", seed=0)
    p = run.masks.named()["fc2.weight"]
    for each in run.masks:
        each.grad = torch.ones_like(each)
    scale_by_norm(run)
    norms = p.detach().norm(dim=1)
    expected = norms / (norms.square().sum() / len(norms)).sqrt()
    torch.testing.assert_close(p.grad, expected[:, None].expand_as(p))


def test_the_norm_factor_reaches_the_step_and_not_rigl(monkeypatch):
    """The first gradient that RigL sees is that of masked SGD; the factor shows in the weights after it."""
    seen: dict[str, torch.Tensor] = {}
    step = RigL.step

    def watched_step(self):
        seen.setdefault(optimizer, next(iter(self.masks)).grad.clone())
        step(self)

    monkeypatch.setattr(RigL, "step", watched_step)
    losses = {}
    for optimizer in ("sgd", "norm"):
        case = {"fan_in": "wide", "update_every": 4, "weight_decay": 0.0, "optimizer": optimizer, "lr": 0.1}
        (found,) = TINY_PREDICTION.measure({**case, "seed": 0}, Settings())
        losses[optimizer] = found["train_loss"]
    assert torch.equal(seen["sgd"], seen["norm"])
    assert losses["sgd"] != losses["norm"]


def test_a_run_never_sees_the_test_images():
    data = images("digits", None, 640, 200)
    full = load_dataset("digits")
    assert torch.equal(data.dataset.train_images, full.train_images[:640])
    assert torch.equal(data.dataset.test_images, full.train_images[640:840])
    assert torch.equal(data.test_images, full.test_images)
    assert images("digits", None, 640, 200, 2).dataset.image_shape == (1, 4, 4)


def test_a_run_that_diverges_has_no_accuracy():
    data = images("digits", None, 640, 200)
    config = tiny_config(lr=1e30, warmup_epochs=0, max_grad_norm=None)
    found = measured(Run(config, data.dataset, "sgd", 0), data)
    assert math.isnan(found["held_out_accuracy"])
    assert math.isnan(found["test_accuracy"])
    assert math.isnan(found["first_epoch"])


@pytest.mark.parametrize(
    ("experiment", "count"),
    [(TINY_SMALL, 10 * (5 + 2)), (TINY_PREDICTION, 2 * 3 * 2 * 3)],
    ids=lambda x: str(x)[:10],
)
@pytest.mark.slow
def test_rows_table_and_picture(experiment, count, tmp_path):
    results = Results(experiment, tmp_path / "results.csv")
    measure_all(results, Settings(), workers=1)
    rows = results.rows()
    assert len(rows) == count
    assert Results(experiment, tmp_path / "results.csv").rows() == rows
    assert all(0.0 <= row["test_accuracy"] <= 1.0 for row in rows if not math.isnan(row["test_accuracy"]))
    assert mean_of_last(rows) > 0.3  # of ten classes: it has learnt something
    assert "±" in "\n".join(experiment.table(rows))
    assert _png(experiment, rows).startswith(b"\x89PNG")


@pytest.mark.parametrize("experiment", [TINY_SMALL, TINY_PREDICTION], ids=["small", "prediction"])
def test_table_and_picture_of_nothing_yet(experiment):
    assert experiment.table([])
    assert _png(experiment, []).startswith(b"\x89PNG")


def mean_of_last(rows):
    values = [row["test_accuracy"] for row in rows if not math.isnan(row["test_accuracy"])]
    return sum(values) / len(values)
