"""What the probe records of a run, by hand; and that a run is not changed by being looked at."""

import math
from itertools import pairwise

import pytest
import torch
from torch import tensor

from sparseopt_kernels.correction import mask_factors
from sparseopt_kernels.lab.reproduce.skew_probe import (
    COLUMNS,
    Gradient,
    Probe,
    Window,
    angle,
    equilibrium_angle,
    gradients_under,
    rotation,
    row_angles,
)
from sparseopt_kernels.lab.training.config import new_config
from sparseopt_kernels.lab.training.data import load_dataset
from sparseopt_kernels.lab.training.run import Run
from sparseopt_kernels.neurons import Neurons

DEGREES = 1e-3
ALL = tensor([[True, True], [True, True]])


pytestmark = pytest.mark.usefixtures("one_thread")


class TestWindow:
    def window(self, fan_in, squares, norms=(1.0, 2.0), turns=(3.0, 5.0)):
        counts = tensor(fan_in)
        return Window(counts, (counts / counts.double().mean()).sqrt(), *map(tensor, (norms, squares, turns)))

    def test_summary_of_two_neurons(self):
        # Fan-in 1 and 4; root mean squares of the active gradient sqrt(4/1) = 2 and sqrt(4/4) = 1.
        summary = self.window([1, 4], [4.0, 4.0]).summary(None)
        assert summary["fan_in_spread"] == pytest.approx(1.5 / 2.5)
        assert summary["c_largest"] == pytest.approx(math.sqrt(4 / 2.5))
        assert summary["c_spread"] == pytest.approx(1 / 3)  # c is as 1 : 2
        assert summary["gradient_exponent"] == pytest.approx(-0.5)
        assert summary["norm_exponent"] == pytest.approx(0.5)
        assert summary["turn"] == 4.0
        assert summary["turn_rank_correlation"] == pytest.approx(1.0)
        assert "later_exponent" not in summary

    def test_neurons_without_inputs_are_left_out(self):
        summary = self.window([0, 4], [0.0, 4.0]).summary(None)
        assert summary["turn"] == 5.0

    def test_what_came_of_a_change_of_fan_in(self):
        # Fan-in times 4 and by 4; root mean square from 2 to 1 and from 1 to 2.
        summary = self.window([4, 1], [4.0, 4.0]).summary(self.window([1, 4], [4.0, 4.0]))
        assert summary["later_exponent"] == pytest.approx(-0.5)

    def test_an_unchanged_fan_in_has_no_exponent(self):
        window = self.window([1, 4], [4.0, 4.0])
        assert math.isnan(window.summary(window)["later_exponent"])


def make_run(optimizer="sgd", **options):
    config = new_config(
        {
            "method": "rigl",
            "epochs": 10,
            "batch_size": 100,
            "warmup_epochs": 1,
            "update_every": 25,
            "threads": 1,
            "device": "cpu",
            **options,
        }
    )
    return Run(config, load_dataset("digits"), optimizer, seed=0)


def layers_of(run):
    return [name for name in run.masks.named() if name != "classifier.weight"]


def train(run, on_step):
    while not run.done:
        run.train_epoch(on_step)
    return run


class TestGradientsUnder:
    def test_it_repeats_the_gradient_of_the_run(self):
        run = make_run()
        seen = []
        last = {n: p.detach().clone() for n, p in run.model.named_parameters()}

        def compare():
            masks = {name: run.masks[p] for name, p in run.masks.named().items()}
            again = gradients_under(run, last, masks, layers_of(run))
            for name, parameter in run.masks.named().items():
                if name in again:
                    torch.testing.assert_close(again[name], parameter.grad, rtol=1e-4, atol=1e-6)
            last.update({n: p.detach().clone() for n, p in run.model.named_parameters()})
            seen.append(len(again))

        run.train_epoch(compare)
        assert seen
        assert set(seen) == {3}

    def test_it_is_that_of_the_network_under_the_mask(self):
        run = make_run()
        run.train_epoch()
        parameters = {n: p.detach().clone() for n, p in run.model.named_parameters()}
        weight = run.model.fc2.weight
        mask = run.masks[weight].clone()
        mask[:, ::2] = False
        seen = gradients_under(run, parameters, {"fc2.weight": mask}, ["fc1.weight", "fc2.weight"])
        with torch.no_grad():
            weight.mul_(mask)
        run.model.train()
        run.model.zero_grad()
        images, labels = run.batch
        torch.nn.functional.cross_entropy(run.model(images), labels).backward()
        torch.testing.assert_close(seen["fc2.weight"], weight.grad)
        torch.testing.assert_close(seen["fc1.weight"], run.model.fc1.weight.grad)


class TestProbe:
    @pytest.mark.parametrize("method", ["rigl", "set"])
    @pytest.mark.slow
    def test_it_changes_nothing_of_the_run(self, method):
        alone, watched = make_run("sparseopt", method=method), make_run("sparseopt", method=method)
        train(alone, lambda: None)
        train(watched, Probe(watched, layers_of(watched)))
        for (name, a), b in zip(
            alone.model.state_dict().items(), watched.model.state_dict().values(), strict=True
        ):
            assert torch.equal(a, b), name

    def test_rows_have_all_that_is_promised(self):
        run = make_run()
        probe = Probe(run, layers_of(run))
        train(run, probe)  # 130 steps: a period of 100, and one that is not over
        rows = probe.rows()
        assert [(row["layer"], row["step"]) for row in rows] == [(name, 100) for name in layers_of(run)]
        for row in rows:
            assert list(row) == ["layer", "step", *COLUMNS]
            assert not [c for c in COLUMNS if math.isnan(row[c])]
            assert row["turn_quarter_1"] > 0
            assert row["c_largest"] > 1

    def test_what_it_records_is_what_happens(self):
        """Followed by hand: two consecutive steps, an update, and the angle by which a neuron turns."""
        run = make_run("sparseopt")
        probe = Probe(run, layers_of(run))
        weight = run.model.fc2.weight
        steps = []

        def on_step():
            probe()
            steps.append(
                (
                    weight.grad.clone(),
                    run.masks[weight].clone(),
                    weight.detach().clone(),
                    run.topology.updated,
                )
            )

        for _ in range(3):
            run.train_epoch(on_step)
        # Number 25, index 24, is the update: its gradient is of the mask before, the next one's of the new.
        assert [i for i, step in enumerate(steps) if step[3]] == [24]
        before, after = steps[24], steps[25]
        old_mask, new_mask = steps[23][1], after[1]
        assert not torch.equal(old_mask, new_mask)
        shared = old_mask & new_mask
        g, h = before[0], after[0]
        c, d = (mask_factors(m, Neurons()).float() for m in (old_mask, new_mask))
        expected = angle(g * shared, h * shared), angle(c * g * shared, d * h * shared)
        seen = probe._seen[100, "fc2.weight"]
        assert seen["update_raw"] == pytest.approx([expected[0]], rel=1e-4)
        assert seen["update_corrected"] == pytest.approx([expected[1]], rel=1e-4)
        assert len(seen["ordinary_raw"]) == len(steps) - 2
        # An ordinary step: both gradients under one mask.
        first = angle(steps[0][0] * old_mask, steps[1][0] * old_mask)
        assert seen["ordinary_raw"][0] == pytest.approx(first, rel=1e-4)
        # The first window: steps 1 to 24 (the update of the 25th is not a turn of the neuron).
        start = make_run("sparseopt").model.fc2.weight.detach()
        states = [start, *(step[2] for step in steps[:24])]
        turns = torch.stack([row_angles(a, b) for a, b in pairwise(states)])
        there = (old_mask.sum(dim=1) > 0) & turns.isfinite().all(dim=0)
        assert seen["turn"][0] == pytest.approx(float(turns.nanmean(dim=0)[there].mean()), rel=1e-3)
        assert len(seen["turn"]) == len(steps) // 25
        assert len(seen["same_batch_raw"]) == 1
        assert seen["turn_predicted"][0] == pytest.approx(
            equilibrium_angle(lr_of_step(25), run.config.weight_decay, 0.9), rel=1e-6
        )

    def test_the_same_batch_is_that_of_the_update(self):
        """The old gradient is the run's, the new one that of the weights that are left, before the step."""
        run = make_run()
        probe = Probe(run, layers_of(run))
        kept = {n: p.detach().clone() for n, p in run.model.named_parameters()}
        old = {n: run.masks[p].clone() for n, p in run.masks.named().items()}
        expected = []

        def on_step():
            if run.topology.updated:
                new = {n: run.masks[p].clone() for n, p in run.masks.named().items()}
                values = gradients_under(run, kept, new, ["fc1.weight"])["fc1.weight"]
                before = Gradient(run.model.fc1.weight.grad, old["fc1.weight"])
                expected.append(rotation(before, Gradient(values, new["fc1.weight"])))
                old.update(new)
            probe()
            kept.update({n: p.detach().clone() for n, p in run.model.named_parameters()})

        for _ in range(5):
            run.train_epoch(on_step)
        seen = probe._seen[100, "fc1.weight"]
        assert len(expected) == 2
        assert seen["same_batch_raw"] == pytest.approx([r.raw for r in expected], rel=1e-4)
        assert seen["same_batch_corrected"] == pytest.approx([r.corrected for r in expected], rel=1e-4)
        assert expected[0].raw > 0.5

    def test_static_masks_are_refused(self):
        run = make_run(method="static")
        with pytest.raises(ValueError, match="static masks"):
            Probe(run, layers_of(run))

    def test_an_interval_that_cuts_windows_is_refused(self):
        run = make_run(update_every=30)
        with pytest.raises(ValueError, match="update_every is 30, it must be a multiple of 25"):
            Probe(run, layers_of(run))


def lr_of_step(step):
    """Thirteen steps of warm-up from 0, then a cosine to 1e-6 over the other 117, counted from 1."""
    progress = (step - 1 - 13) / 117
    return 1e-6 + (0.1 - 1e-6) / 2 * (1 + math.cos(math.pi * progress))
