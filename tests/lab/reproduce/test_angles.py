"""Angles, exponents and turns, on examples one can check by eye."""

import math

import pytest
import torch
from torch import tensor

from sparseopt_kernels.lab.reproduce.skew_probe import (
    Gradient,
    angle,
    angles,
    equilibrium_angle,
    quarter_means,
    rank_correlation,
    rotation,
    row_angles,
    slope,
    spread,
)

DEGREES = 1e-3
ALL = tensor([[True, True], [True, True]])


pytestmark = pytest.mark.usefixtures("one_thread")


class TestAngles:
    @pytest.mark.parametrize(
        ("a", "b", "expected"),
        [
            ([1.0, 0.0], [0.0, 3.0], 90.0),
            ([1.0, 0.0], [5.0, 5.0], 45.0),
            ([1.0, 0.0], [-2.0, 0.0], 180.0),
            ([1.0, 2.0], [2.0, 4.0], 0.0),
            ([1.0, 0.0], [1.0, 1e-4], math.degrees(1e-4)),
        ],
    )
    def test_known_angles(self, a, b, expected):
        assert angle(tensor(a), tensor(b)) == pytest.approx(expected, rel=1e-3, abs=1e-5)

    def test_small_angles_keep_their_digits(self):
        assert angle(tensor([1.0, 0.0]), tensor([1.0, 1e-5])) == pytest.approx(math.degrees(1e-5), rel=1e-3)

    def test_nothing_has_no_angle(self):
        assert math.isnan(angle(tensor([0.0, 0.0]), tensor([1.0, 0.0])))

    def test_each_row_has_its_own(self):
        turned = row_angles(tensor([[1.0, 0.0], [0.0, 2.0]]), tensor([[0.0, 1.0], [3.0, 3.0]]))
        assert turned.tolist() == pytest.approx([90.0, 45.0], abs=DEGREES)

    def test_a_tensor_is_one_vector(self):
        # (1, 0, 0, 1) and (1, 0, 0, 0).
        a, b = tensor([[1.0, 0.0], [0.0, 1.0]]), tensor([[1.0, 0.0], [0.0, 0.0]])
        assert angle(a, b) == pytest.approx(45.0, abs=DEGREES)

    def test_only_what_is_active_before_and_after_counts(self):
        before = Gradient(
            tensor([[1.0, 9.0, 0.0], [7.0, 0.0, 5.0]]), tensor([[True, True, True], [True] * 3])
        )
        after = Gradient(
            tensor([[0.0, 5.0, 2.0], [3.0, 8.0, 5.0]]), tensor([[True, False, True], [False] * 3])
        )
        assert angles(before, after).raw == pytest.approx(90.0, abs=DEGREES)

    def test_each_gradient_is_corrected_under_its_own_mask(self):
        # Fan-in (1, 3), then (3, 1): c = sqrt(1/2), sqrt(3/2), then the other way round.
        first = tensor([[True, False, False], [True, True, True]])
        last = tensor([[True, True, True], [True, False, False]])
        values = tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
        turned = angles(Gradient(values, first), Gradient(values, last))
        assert turned.raw == pytest.approx(0.0, abs=0.05)
        # (1, sqrt 3) and (sqrt 3, 1) lie 60 and 30 degrees from the first axis.
        assert turned.corrected == pytest.approx(30.0, abs=DEGREES)


class TestRotation:
    OLD = tensor([[True, False, False], [True, True, True]])
    NEW = tensor([[True, True, True], [True, False, False]])

    def of(self, old, new):
        # On what both masks have, the first column, the gradients are (old[0], old[1]) and (new[0], new[1]).
        def gradient(values, mask):
            return Gradient(tensor([[values[0], 0.0, 0.0], [values[1], 0.0, 0.0]]), mask)

        return rotation(gradient(old, self.OLD), gradient(new, self.NEW))

    def test_what_equation_11_predicts_is_undone_by_the_correction(self):
        # Fan-in times 3 and by 3: the gradient by sqrt(3) and times sqrt(3).
        root = math.sqrt(3.0)
        seen = self.of((root, 1.0), (1.0, root))
        assert seen.raw == pytest.approx(30.0, abs=DEGREES)
        assert seen.corrected == pytest.approx(0.0, abs=0.05)
        assert seen.scale_alone == pytest.approx(seen.raw, abs=DEGREES)
        assert seen.predicted == pytest.approx(seen.raw, abs=DEGREES)
        assert seen.within_neurons == pytest.approx(0.0, abs=0.05)
        assert seen.exponent == pytest.approx(-0.5)

    def test_without_skew_it_is_the_correction_that_turns_the_gradient(self):
        seen = self.of((1.0, 1.0), (1.0, 1.0))
        assert seen.raw == pytest.approx(0.0, abs=0.05)
        assert seen.corrected == pytest.approx(30.0, abs=DEGREES)
        assert seen.correction_alone == pytest.approx(30.0, abs=DEGREES)
        # (1, 1) by sqrt(3) and times sqrt(3): from 45 to atan(3) degrees.
        assert seen.predicted == pytest.approx(math.degrees(math.atan(3.0)) - 45.0, abs=DEGREES)
        assert seen.exponent == pytest.approx(0.0)

    def test_a_sign_is_no_scale(self):
        seen = self.of((1.0, 1.0), (1.0, -1.0))
        assert seen.raw == pytest.approx(90.0, abs=DEGREES)
        assert seen.within_neurons == pytest.approx(90.0, abs=DEGREES)
        assert seen.scale_alone == pytest.approx(0.0, abs=0.05)

    def test_a_neuron_that_is_switched_off_has_no_exponent(self):
        seen = self.of((1.0, 1.0), (1.0, 0.0))
        assert seen.raw == pytest.approx(45.0, abs=DEGREES)
        assert math.isnan(seen.exponent)

    def test_an_unchanged_mask_turns_nothing(self):
        same = Gradient(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.ones(4, 3) > 0)
        seen = rotation(same, same)
        assert seen[:-1] == pytest.approx([0.0] * 6, abs=0.05)
        assert math.isnan(seen.exponent)

    def test_convolutions_have_a_neuron_per_filter(self):
        seen = rotation(
            *(
                Gradient(values.view(2, 1, 1, 3), mask.view(2, 1, 1, 3))
                for values, mask in (
                    (tensor([[1.0, 0, 0], [1.0, 0, 0]]), self.OLD),
                    (tensor([[1.0, 0, 0], [1.0, 0, 0]]), self.NEW),
                )
            )
        )
        assert seen.corrected == pytest.approx(30.0, abs=DEGREES)


class TestNumbers:
    def test_slope(self):
        assert slope(tensor([0.0, 1.0, 2.0]), tensor([5.0, 4.0, 3.0])) == pytest.approx(-1.0)
        assert slope(tensor([0.0, 1.0, 2.0]), tensor([0.0, 3.0, 0.0])) == pytest.approx(0.0)
        assert math.isnan(slope(tensor([2.0, 2.0]), tensor([1.0, 3.0])))

    def test_spread(self):
        assert spread(tensor([1, 3])) == pytest.approx(0.5)
        assert math.isnan(spread(tensor([0, 0])))

    def test_quarter_means(self):
        by = tensor([8, 1, 2, 7, 3, 4, 6, 5])
        assert quarter_means(by.float() * 10, by) == [15.0, 35.0, 55.0, 75.0]

    def test_rank_correlation(self):
        assert rank_correlation(tensor([1.0, 2.0, 9.0]), tensor([3.0, 4.0, 5.0])) == pytest.approx(1.0)
        assert rank_correlation(tensor([1.0, 2.0, 9.0]), tensor([3.0, 2.0, 1.0])) == pytest.approx(-1.0)
        assert math.isnan(rank_correlation(tensor([1.0, 1.0]), tensor([1.0, 2.0])))

    def test_rank_correlation_with_ties_is_spearmans(self):
        from scipy.stats import spearmanr

        a, b = tensor([1.0, 2.0, 2.0, 5.0, 5.0, 5.0, 7.0]), tensor([3.0, 1.0, 4.0, 4.0, 6.0, 2.0, 9.0])
        assert rank_correlation(a, b) == pytest.approx(spearmanr(a.numpy(), b.numpy()).statistic)

    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    @pytest.mark.parametrize("factor", [1.0, 3.0])
    def test_the_equilibrium_is_where_a_scale_invariant_neuron_ends(self, momentum, factor):
        # The gradient is orthogonal to the neuron, of random direction, and proportional to 1/norm.
        lr, weight_decay = 0.1, 0.02
        generator = torch.Generator().manual_seed(0)
        w = torch.nn.Parameter(0.4 * torch.randn(50, 200, generator=generator, dtype=torch.float64))
        optimizer = torch.optim.SGD([w], lr=lr, momentum=momentum, weight_decay=weight_decay)
        turned = []
        for step in range(900):
            with torch.no_grad():
                before = w.clone()
                noise = torch.randn(w.shape, generator=generator, dtype=torch.float64)
                unit = w / w.norm(dim=1, keepdim=True)
                orthogonal = noise - (noise * unit).sum(dim=1, keepdim=True) * unit
                w.grad = factor * orthogonal / w.norm(dim=1, keepdim=True)
            optimizer.step()
            if step >= 600:
                turned.append(row_angles(before, w.detach()).mean())
        expected = equilibrium_angle(lr, weight_decay, momentum)
        assert float(torch.stack(turned).mean()) == pytest.approx(expected, rel=0.03)

    def test_no_weight_decay_no_equilibrium(self):
        assert equilibrium_angle(0.1, 0.0, 0.9) == 0.0
