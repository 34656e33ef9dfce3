import math

import pytest

from sparseopt_kernels.lab.training.config import new_config
from sparseopt_kernels.lab.training.paired import t_quantile
from sparseopt_kernels.lab.training.report import comparison, results_csv, table
from sparseopt_kernels.lab.training.run import Row


def row(optimizer="sgd", seed=0, epoch=2, accuracy=0.9, status="ok", loss=0.5):
    return Row(optimizer, seed, epoch, loss, 0.95, 0.4, accuracy, 0.9, 0.1, 0.05, 1.25, status)


def config(**given):
    return new_config({"epochs": 2, "seeds": (0, 1, 2), "device": "cpu", **given})


def test_csv_has_a_header_and_full_precision():
    header, line = results_csv([row(accuracy=1 / 3)]).splitlines()
    assert header.startswith("optimizer,seed,epoch,train_loss")
    assert dict(zip(header.split(","), line.split(","), strict=True))["test_accuracy"] == repr(1 / 3)


def test_table_shows_mean_spread_and_epochs_to_a_level():
    rows = [row("sgd", s, e, a) for s, a in enumerate((0.90, 0.92, 0.94)) for e in (1, 2)]
    rows += [row("sparseopt", s, e, 0.95 if e == 2 else 0.5) for s in range(3) for e in (1, 2)]
    lines = table(rows, config(), 1000).splitlines()
    assert "epochs to 91%" in lines[0]
    assert "92.00 ± 2.00 %" in lines[2]
    assert "2 of 3 runs" in lines[2]
    assert "95.00 ± 0.00 %" in lines[3]
    assert " 2.0 " in lines[3]


def test_table_leaves_out_and_names_what_diverged_or_did_not_end():
    rows = [row(seed=0), row(seed=1, epoch=1, accuracy=math.nan, status="diverged"), row(seed=2, epoch=1)]
    text = table(rows, config(optimizer=("sgd",)), 100)
    assert "sgd seed 1 diverged in epoch 1" in text
    assert "1 of 3 runs did not finish" in text
    assert "90.00 %" in text


def test_table_of_nothing_but_divergence():
    rows = [row(seed=s, epoch=1, accuracy=math.nan, status="diverged") for s in range(3)]
    assert table(rows, config(optimizer=("sgd",)), 100).count("diverged") == 3


def compare(differences, examples=10_000):
    final = {("sgd", s): row("sgd", s, accuracy=0.9) for s in range(len(differences))}
    final |= {("sparseopt", s): row("sparseopt", s, accuracy=0.9 + d) for s, d in enumerate(differences)}
    return comparison("sparseopt", "sgd", final, examples)


@pytest.mark.parametrize(
    ("differences", "examples", "verdict"),
    [
        ([0.01, -0.01, 0.005], 10_000, "within the noise"),
        ([0.030, 0.031, 0.029], 10_000, "more than the noise"),
        ([-0.030, -0.031, -0.029], 10_000, "more than the noise"),
        ([0.01, 0.01, 0.01], 100, "within the noise"),  # one example of 100, three times
        ([0.01, 0.01], 10_000, "noise unknown"),
        ([0.01], 10_000, "noise unknown"),
    ],
)
def test_comparison_says_what_can_be_concluded(differences, examples, verdict):
    assert verdict in compare(differences, examples)


def test_comparison_gives_the_confidence_interval():
    # By hand: mean 2, standard deviation 1, t(2) = 4.303, 4.303 / sqrt(3) = 2.48.
    assert "+2.00 points ± 2.48" in compare([0.01, 0.02, 0.03])


def test_comparison_of_different_seeds_is_refused():
    final = {("sgd", 0): row(), ("sparseopt", 1): row("sparseopt", 1)}
    assert "no seed in common" in comparison("sparseopt", "sgd", final, 100)


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 12.706), (2, 4.303), (9, 2.262), (30, 2.042), (120, 1.980)]
)
def test_t_quantiles_of_printed_tables(degrees, quantile):
    assert t_quantile(degrees) == pytest.approx(quantile, abs=5e-4)
