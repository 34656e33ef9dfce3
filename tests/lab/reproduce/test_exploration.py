"""Figures 5 and 10: what is run, that R_m is what it says, and what is made of the rows."""

import dataclasses

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from sparseopt_kernels.lab.reproduce.catalogue import EXPERIMENTS
from sparseopt_kernels.lab.reproduce.experiment import Settings
from sparseopt_kernels.lab.reproduce.exploration import ARMS, BASELINE, FIGURE5, FIGURE10, Arm, difference
from sparseopt_kernels.lab.training import run as run_module
from sparseopt_kernels.lab.training.data import load_dataset

BY_G, BY_CORRECTED = Arm("sparseopt", "original"), Arm("sparseopt", "corrected")
TINY = dataclasses.replace(
    FIGURE10, model="mlp", examples=(400, 100), epochs=(2, 4), seeds=(0, 1), sparsities=(0.9, 0.97)
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As experiments are measured: on small tensors a second thread costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rows_of(rates, experiment=TINY, **others):
    """Rows with the given R_m by (arm, epochs, sparsity, seed)."""
    return [
        {
            "epochs": epochs,
            "sparsity": sparsity,
            **arm._asdict(),
            "seed": seed,
            "mask_updates": 7,
            "exploration_rate": rate,
            "test_accuracy": 0.5,
            "diverged": False,
            **others,
        }
        for (arm, epochs, sparsity, seed), rate in rates.items()
    ]


FULL = rows_of(
    {
        (arm, epochs, sparsity, seed): rate + 0.01 * seed + 0.1 * (epochs == 4)
        for epochs in (2, 4)
        for sparsity in (0.9, 0.97)
        for seed in (0, 1)
        for arm, rate in ((BASELINE, 0.2), (BY_G, 0.25), (BY_CORRECTED, 0.15 + 0.02 * seed))
    }
)


class TestCases:
    def test_every_arm_at_every_sparsity_length_and_seed(self):
        cases = TINY.cases([])
        assert len({tuple(case[k] for k in TINY.key) for case in cases}) == len(cases) == 2 * 2 * 2 * 3
        assert {(case["optimizer"], case["regrow"]) for case in cases} == set(ARMS)
        assert set(map(tuple, cases)) == {tuple(TINY.key)}

    def test_a_longer_run_takes_longer(self):
        short, long = ({"epochs": epochs} for epochs in (2, 4))
        assert TINY.seconds(long) == 2 * TINY.seconds(short)

    def test_the_papers_figures(self):
        assert EXPERIMENTS["figure5"] is FIGURE5
        assert EXPERIMENTS["figure10"] is FIGURE10
        assert len(FIGURE5.epochs) == 1
        # As 100, 300 and 500 epochs.
        assert [epochs / FIGURE10.epochs[0] for epochs in FIGURE10.epochs] == [1, 3, 5]


def case_of(arm):
    return {"epochs": 4, "sparsity": 0.9, **arm._asdict(), "seed": 1}


@pytest.fixture(scope="module")
def measured(one_thread):
    """One case of each arm."""
    return {arm: TINY.measure(case_of(arm), Settings())[0] for arm in ARMS}


class TestMeasurement:
    def test_a_row_is_of_the_columns(self, measured):
        for arm, row in measured.items():
            assert list(row) == list(TINY.columns)
            assert {k: type(v) for k, v in row.items()} == dict(TINY.columns)
            assert {k: row[k] for k in TINY.key} == case_of(arm)

    def test_updates_are_counted(self, measured):
        # 400 images in batches of 64: 7 steps, 28 in all, an update every 3 before step 21.
        assert {row["mask_updates"] for row in measured.values()} == {6}

    def test_each_arm_explores_in_its_own_way(self, measured):
        rates = {row["exploration_rate"] for row in measured.values()}
        assert len(rates) == 3
        assert all(0.1 < rate < 0.6 for rate in rates)

    def test_the_rate_is_the_union_of_all_masks(self, monkeypatch, measured):
        seen = []

        class Watched(run_module.Run):
            def train_epoch(self, on_step=lambda: None):
                def watch():
                    seen.append([mask.clone() for mask in self.masks.values()])
                    on_step()

                seen.append([mask.clone() for mask in self.masks.values()])
                return super().train_epoch(watch)

        monkeypatch.setattr("sparseopt_kernels.lab.reproduce.exploration.Run", Watched)
        row = TINY.measure(case_of(BY_G), Settings())[0]
        unions = [torch.stack(masks).any(dim=0) for masks in zip(*seen, strict=True)]
        active = sum(int(union.sum()) for union in unions)
        assert row["exploration_rate"] == active / sum(union.numel() for union in unions)
        assert row == measured[BY_G]

    def test_the_data_are_looked_for_first(self, tmp_path):
        from sparseopt_kernels.lab.training.errors import TrainingError

        with pytest.raises(TrainingError, match="does not have"):
            FIGURE5.check(Settings(str(tmp_path)))
        FIGURE10.check(Settings(str(tmp_path)))  # the digits need no folder


class TestResults:
    def test_rates_are_of_one_arm_length_and_sparsity_by_seed(self):
        assert TINY.rates(FULL, BY_G, 2, 0.9) == pytest.approx({0: 25.0, 1: 26.0})
        assert TINY.rates(FULL, BASELINE, 4, 0.97) == pytest.approx({0: 30.0, 1: 31.0})

    def test_what_diverged_is_left_out_and_told(self):
        bad = rows_of({(BY_G, 2, 0.9, 0): 0.9}, diverged=True)
        rows = [row for row in FULL if (row["seed"], row["optimizer"]) != (0, "sparseopt")] + bad
        assert TINY.rates(rows, BY_G, 2, 0.9) == pytest.approx({1: 26.0})
        assert "1 runs diverged" in TINY.table(rows)[-1]
        assert not any("diverged" in line for line in TINY.table(FULL))

    def test_differences_are_paired_by_seed(self):
        # 1 and 3: mean 2, standard deviation sqrt(2), half width 12.706 * 1.
        seen = difference({0: 11.0, 1: 23.0, 2: 5.0}, {1: 20.0, 0: 10.0})
        assert seen == pytest.approx((2.0, 12.706), abs=1e-3)
        assert difference({0: 1.0}, {0: 2.0}) is None

    def test_table(self):
        table = TINY.table(FULL)
        line = next(line for line in table if line.lstrip().startswith("2, 0.97"))
        assert "20.50 ± 0.71" in line
        assert "+5.00 ± 0.00" in line
        assert "-4.00 ± 12.71" in line  # -5 and -3
        assert "CIFAR-100" in table[-1]

    def test_picture(self):
        figure = Figure()
        TINY.draw(FULL, figure)
        upper, lower = figure.axes[1], figure.axes[3]  # the longer training
        assert upper.get_title(loc="left") == "4 epochs, 7 mask updates"
        curves = {tuple(np.round(np.asarray(line.get_ydata(), dtype=float), 6)) for line in upper.lines}
        assert {(30.5, 30.5), (35.5, 35.5), (26.5, 26.5), (10.0, 3.0)} <= curves
        bottom, top = upper.get_ylim()
        assert bottom == 0
        assert top > 36.5
        points = [line for line in lower.lines if line.get_marker() in ("s", "^")]
        assert {float(np.round(np.asarray(point.get_ydata(), dtype=float), 6)[0]) for point in points} == {
            -4.0,
            5.0,
        }

    def test_picture_of_unfinished_results(self):
        TINY.draw(FULL[:4], Figure())
        TINY.table(FULL[:4])


def test_a_part_of_a_dataset():
    whole = load_dataset("digits")
    part = whole.first(100, 20)
    assert torch.equal(part.train_images, whole.train_images[:100])
    assert torch.equal(part.train_labels, whole.train_labels[:100])
    assert torch.equal(part.test_images, whole.test_images[:20])
    assert torch.equal(part.test_labels, whole.test_labels[:20])
    assert len(whole.first(10**6, 10**6).train_labels) == len(whole.train_labels)
