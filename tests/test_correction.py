"""The factors c_i of masks."""

import math

import pytest
import torch

from sparseopt_kernels.correction import mask_factors
from sparseopt_kernels.neurons import Neurons


class TestCorrectionFactors:
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)

    @pytest.mark.parametrize(
        ("correction", "squares"),
        [("layer", [2.0, 0.5, 0.0, 1.5]), ("unnormalized", [1.0, 0.25, 0.0, 0.75]), ("none", [1.0] * 4)],
    )
    def test_by_hand(self, correction, squares):
        factors = mask_factors(self.mask, Neurons(), correction)
        expected = torch.tensor([math.sqrt(square) for square in squares], dtype=torch.float64)
        assert torch.equal(factors, expected.view(4, 1))

    @pytest.mark.parametrize("fan_in", range(1, 100))
    def test_exactly_one_for_equal_fan_in(self, fan_in):
        mask = (torch.arange(100) < fan_in).expand(7, 100)
        assert torch.equal(mask_factors(mask, Neurons()), torch.ones(7, 1, dtype=torch.float64))

    def test_an_empty_mask_gives_no_nan(self):
        empty = torch.zeros(3, 4, dtype=torch.bool)
        assert not mask_factors(empty, Neurons()).isnan().any()

    def test_transposed_convolution_with_groups(self):
        torch.manual_seed(0)
        mask = torch.rand(6, 2, 3, 3) < 0.3  # in 6, out 4, two groups
        factors = mask_factors(mask, Neurons(dim=1, groups=2))
        assert factors.shape == (6, 2, 1, 1)
        mean = int(mask.sum()) / 4
        for group in range(2):
            for j in range(2):
                rows = slice(3 * group, 3 * group + 3)
                expected = (int(mask[rows, j].sum()) / mean) ** 0.5
                assert factors[rows, j].flatten().tolist() == pytest.approx([expected] * 3)
