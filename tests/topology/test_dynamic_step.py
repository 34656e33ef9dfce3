"""One update of SET and RigL: when masks change, what is dropped, grown and zeroed."""

import math
import warnings

import pytest
import torch
from by_hand import bits, parameter_with
from method_seeds import updated_by_step
from torch import nn

from sparseopt_kernels.masks.mapping import Masks
from sparseopt_kernels.topology.rigl import RigL
from sparseopt_kernels.topology.set import SET

BOTH = pytest.mark.parametrize("cls", [SET, RigL])


class TestStep:
    """One parameter of 8 elements, 4 of them active, half of which drop at every update."""

    def setup_method(self):
        self.parameter = parameter_with([4.0, -1, 0, 0, 3, -2, 0, 0], [0.0, 0, -5, 1, 0, 6, 0, -1])
        self.mask = bits("1100 1100")

    def make(self, cls, **options):
        options = {"drop_fraction": 0.5, "update_every": 1, "stop_at": math.inf, **options}
        return cls({self.parameter: self.mask}, **options)

    def test_rigl_by_hand(self):
        # -1 and -2 drop; the largest gradients not kept are those of -2, which regrows, and index 2.
        assert updated_by_step(self.make(RigL)) is True
        assert self.mask.tolist() == bits("1010 1100").tolist()
        assert self.parameter.tolist() == [4, 0, 0, 0, 3, -2, 0, 0]

    def test_set_keeps_the_largest_and_the_number(self):
        for seed in range(20):
            self.setup_method()
            changed = updated_by_step(self.make(SET, seed=seed))
            assert self.mask[[0, 4]].all()
            assert int(self.mask.sum()) == 4
            assert changed == (self.mask.tolist() != bits("1100 1100").tolist())
            expected = torch.tensor([4.0, -1, 0, 0, 3, -2, 0, 0]) * self.mask
            assert torch.equal(self.parameter.detach(), expected)

    def test_the_mask_is_written_in_place(self):
        before, version = self.mask.data_ptr(), self.mask._version
        self.make(RigL).step()
        assert self.mask.data_ptr() == before
        assert self.mask._version > version

    def test_the_gradient_is_not_written(self):
        before, version = self.parameter.grad.clone(), self.parameter.grad._version
        self.make(RigL).step()
        assert torch.equal(self.parameter.grad, before)
        assert self.parameter.grad._version == version

    def test_an_update_that_changes_nothing_says_so(self):
        self.parameter.grad = torch.tensor([0.0, 9, 0, 0, 0, 9, 0, 0])
        assert updated_by_step(self.make(RigL)) is False
        assert self.mask.tolist() == bits("1100 1100").tolist()
        assert self.parameter.tolist() == [4, -1, 0, 0, 3, -2, 0, 0]

    def test_a_grown_weight_starts_at_zero_even_if_its_value_was_left_over(self):
        with torch.no_grad():
            self.parameter[2] = 7.0
        self.make(RigL).step()
        assert self.mask[2]
        assert self.parameter[2] == 0.0

    @BOTH
    @pytest.mark.parametrize("mask", ["11111111", "00000000"])
    def test_full_and_empty_masks_never_change(self, cls, mask):
        self.mask = bits(mask)
        assert updated_by_step(self.make(cls)) is False
        assert self.mask.tolist() == bits(mask).tolist()

    @BOTH
    def test_when_updates_happen(self, cls):
        # 12 is a multiple as well; stop_at is not a step at which the fraction happens to be 0.
        self.parameter, self.mask = nn.Parameter(torch.zeros(400)), torch.arange(400) < 200
        dst = self.make(cls, update_every=3, stop_at=10.5)
        calls = []
        for call in range(1, 16):
            before, version = self.mask.clone(), self.mask._version
            self.parameter.grad = torch.randn(400)
            changed = updated_by_step(dst)
            assert changed == (not torch.equal(self.mask, before))
            assert changed == (self.mask._version != version)
            if changed:
                calls.append(call)
        assert calls == [3, 6, 9]

    @pytest.mark.parametrize("step", [1, 4, 7, 9])
    def test_the_number_of_dropped_weights_follows_the_cosine(self, step):
        parameter = parameter_with([float(i) for i in range(1, 1001)] + [0.0] * 1000)
        parameter.grad = torch.cat([torch.zeros(1000), torch.ones(1000)])
        mask = torch.arange(2000) < 1000
        dst = RigL({parameter: mask}, drop_fraction=0.4, update_every=step, stop_at=10)
        for _ in range(step):
            dst.step()
        dropped = int(0.2 * (1 + math.cos(math.pi * step / 10)) * 1000)
        expected = (torch.arange(2000) >= dropped) & (torch.arange(2000) < 1000 + dropped)
        assert torch.equal(mask, expected)

    @BOTH
    def test_a_postponed_update_is_made_at_the_next_finite_step(self, cls):
        good = self.parameter.grad.clone()
        dst = self.make(cls, drop_fraction=1.0, update_every=3, stop_at=100)
        self.parameter.grad[7] = math.nan
        assert [updated_by_step(dst) for _ in range(4)] == [False] * 4
        assert self.mask.tolist() == bits("1100 1100").tolist()
        assert self.parameter.tolist() == [4, -1, 0, 0, 3, -2, 0, 0]
        self.parameter.grad = good
        assert updated_by_step(dst) is True
        # Step 6 is due by itself and made at step 7; step 8 is not due.
        self.parameter.grad = torch.full((8,), -math.inf)
        assert updated_by_step(dst) is False
        self.parameter.grad = torch.roll(good, 1)
        with torch.no_grad():
            self.parameter.copy_(self.mask)
        dst.step()
        mask = self.mask.clone()
        self.parameter.grad = torch.roll(good, 2)
        assert updated_by_step(dst) is False
        assert torch.equal(self.mask, mask)

    @BOTH
    def test_an_update_that_is_postponed_for_long_is_warned_of(self, cls):
        good = self.parameter.grad.clone()
        dst = self.make(cls, drop_fraction=1.0, update_every=3, stop_at=100)
        said = []
        for step in range(1, 60):
            self.parameter.grad = torch.full((8,), math.inf) if step % 30 else good.clone()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                dst.step()
            said += [(step, str(w.message)) for w in caught]
        assert [step for step, _ in said] == [22, 52]
        assert said[0][1].startswith(f"an update of {cls.__name__} has been postponed for 20 steps")

    @BOTH
    def test_one_bad_gradient_postpones_all_layers(self, cls):
        other = parameter_with([1.0, 0, 0], [math.inf, 0, 0])
        other_mask = bits("100")
        dst = cls({self.parameter: self.mask, other: other_mask}, 0.5, 1, stop_at=100)
        assert updated_by_step(dst) is False
        assert self.mask.tolist() == bits("1100 1100").tolist()

    def test_a_postponed_update_lapses_at_the_end(self):
        dst = self.make(RigL, stop_at=3)
        good = self.parameter.grad.clone()
        self.parameter.grad[0] = math.nan
        dst.step()
        dst.step()
        self.parameter.grad = good
        assert updated_by_step(dst) is False

    def test_a_loss_scale_does_not_matter(self):
        self.make(RigL).step()
        expected = self.mask.clone()
        self.setup_method()
        self.parameter.grad *= 65536.0
        self.make(RigL).step()
        assert torch.equal(self.mask, expected)

    def test_set_needs_no_gradient(self):
        self.parameter.grad = None
        results = [updated_by_step(self.make(SET, drop_fraction=1.0, seed=seed)) for seed in range(5)]
        assert any(results)

    def test_rigl_without_any_gradient_is_an_error(self):
        self.parameter.grad = None
        dst = self.make(RigL, update_every=2)
        assert updated_by_step(dst) is False
        with pytest.raises(RuntimeError, match=r"after loss\.backward\(\) and before opt\.zero_grad\(\)"):
            dst.step()

    def test_rigl_leaves_a_parameter_without_gradient_alone(self):
        other, other_mask = parameter_with([1.0, 2, 0, 0]), bits("1100")
        dst = RigL({other: other_mask, self.parameter: self.mask}, 0.5, 1, stop_at=100)
        assert updated_by_step(dst) is True
        assert other_mask.tolist() == bits("1100").tolist()
        assert other.tolist() == [1, 2, 0, 0]

    def test_set_leaves_a_frozen_parameter_alone(self):
        self.parameter.requires_grad_(False)
        assert not any(updated_by_step(self.make(SET, drop_fraction=1.0, seed=seed)) for seed in range(5))
        assert self.mask.tolist() == bits("1100 1100").tolist()

    def test_at_learning_rate_zero_only_active_weights_drop(self):
        # Grown weights stay exactly 0, like the masked ones: the number must hold all the same.
        dst = self.make(RigL, drop_fraction=0.5)
        torch.manual_seed(0)
        for _ in range(30):
            self.parameter.grad = torch.randn(8)
            dst.step()
            assert int(self.mask.sum()) == 4
            assert not self.parameter[~self.mask].any()


class TestCorrectedRegrow:
    def layer(self):
        """Neuron 0 has one active weight, neuron 1 four: c = sqrt(0.4), sqrt(1.6)."""
        weight = parameter_with(
            [[1.0, 0, 0, 0, 0, 0], [9, 8, 7, 6, 0, 0]], [[0.0, 3, 3, 3, 3, 3], [0, 0, 0, 0, 2, 2]]
        )
        return weight, weight.detach() != 0

    @pytest.mark.parametrize(
        ("regrow", "expected"), [("original", "010000 111100"), ("corrected", "000000 111110")]
    )
    def test_by_hand(self, regrow, expected):
        weight, mask = self.layer()
        assert updated_by_step(RigL({weight: mask}, 0.2, 1, stop_at=math.inf, regrow=regrow))
        assert mask.flatten().tolist() == bits(expected).tolist()

    def test_neurons_of_a_model_are_those_of_its_layers(self):
        model = nn.Sequential(nn.ConvTranspose1d(2, 3, 1))
        weight = model.get_parameter("0.weight")
        mask = torch.tensor([[[1], [1], [0]], [[1], [0], [0]]], dtype=torch.bool)
        model[0].register_buffer("weight_mask", mask)
        with torch.no_grad():
            weight.copy_(torch.tensor([[[5.0], [6], [0]], [[1], [0], [0]]]))
        # Fan-in 2, 1, 0. The first drops; it is free again with c = sqrt(2), (1, 1) with 1, the others 0.
        weight.grad = torch.tensor([[[0.0], [0], [9]], [[3], [4], [9]]])
        dst = RigL(Masks(model), 0.34, 1, stop_at=math.inf, regrow="corrected")
        dst.step()
        assert mask.flatten().tolist() == bits("110 100").tolist()
