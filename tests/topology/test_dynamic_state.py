"""The state of SET and RigL, and what no update changes."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_seeds import seeded, updated_by_step
from torch import nn

from sparseopt_kernels.topology.drop_schedules import cosine
from sparseopt_kernels.topology.rigl import RigL
from sparseopt_kernels.topology.set import SET


class TestState:
    def make(self, cls=SET, size=8, **options):
        mask = torch.arange(size) < size // 2
        parameter = nn.Parameter(torch.randn(size) * mask)
        parameter.grad = torch.randn(size)
        return cls({parameter: mask}, **{"update_every": 2, "stop_at": 100.5, **options})

    def test_a_postponed_update_survives(self):
        dst = self.make(RigL, drop_fraction=1.0)
        (parameter,) = dst.masks
        parameter.grad[0] = math.nan
        dst.step()
        dst.step()
        other = self.make(RigL)
        other.load_state_dict(dst.state_dict())
        (parameter,) = other.masks
        parameter.grad = torch.cat([torch.zeros(4), torch.ones(4)])
        assert updated_by_step(other) is True

    def test_the_state_is_a_snapshot(self):
        dst = self.make(drop_fraction=1.0)
        state = dst.state_dict()
        before = copy.deepcopy(state)
        for _ in range(6):
            dst.step()
        assert state["step"] == before["step"] == 0
        assert torch.equal(state["explored"][0], before["explored"][0])
        assert dst.exploration_rate() > 0.5

    def test_a_mask_written_by_the_user_counts_as_explored(self):
        dst = self.make()
        (mask,) = dst.masks.values()
        mask.copy_(~mask)
        assert dst.exploration_rate() == 1.0
        mask.copy_(~mask)
        other = self.make(drop_fraction=1.0)
        (mask,) = other.masks.values()
        mask.copy_(~mask)
        other.step()
        other.step()
        # Seen at the update as well, whatever the mask is by now.
        assert other.exploration_rate() == 1.0

    def test_the_wrong_state_is_refused(self):
        with pytest.raises(ValueError, match=r"state_dict has keys .*'regrow'.*, it must have"):
            self.make(SET).load_state_dict(self.make(RigL).state_dict())
        with pytest.raises(ValueError, match=r"masks of shapes \[\(6,\)\], they must be \[\(8,\)\]"):
            self.make().load_state_dict(self.make(size=6).state_dict())

    def test_loading_copies(self):
        dst, other = self.make(), self.make()
        state = dst.state_dict()
        other.load_state_dict(state)
        state["explored"][0].fill_(True)
        assert other.exploration_rate() == 0.5

    def test_after_loading_the_ranks_are_compared(self, monkeypatch):
        """In the next step, whether an update is due or not: the states may come from different files."""
        compared = []
        monkeypatch.setattr(
            "sparseopt_kernels.topology.dynamic_sparse_training.check_masks_agree",
            lambda clock, *_: compared.append(clock["step"]),
        )
        dst = self.make(update_every=50)
        for _ in range(3):
            dst.step()
        assert compared == [1]
        dst.load_state_dict(dst.state_dict())
        for _ in range(3):
            dst.step()
        assert compared == [1, 4]


@settings(max_examples=40, deadline=None)
@given(
    cls=st.sampled_from([SET, RigL]),
    shape=st.sampled_from([(7,), (1, 1), (5, 9), (4, 3, 3, 3), (0, 4)]),
    density=st.floats(0, 1),
    drop_fraction=st.floats(0, 1),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_invariants(cls, shape, density, drop_fraction, seed, dtype):
    rng = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=rng) < density
    values = torch.randn(shape, generator=rng).to(dtype) * mask
    parameter = nn.Parameter(values.clone())
    dst = cls({parameter: mask}, drop_fraction, 1, stop_at=4, **seeded(cls, seed))
    ever = mask.clone()
    for step in range(1, 4):
        old_mask, old_values = mask.clone(), parameter.detach().clone()
        parameter.grad = torch.randint(-2, 3, shape, generator=rng).to(dtype)
        changed = updated_by_step(dst)
        ever |= mask
        assert changed == (not torch.equal(mask, old_mask))
        assert int(mask.sum()) == int(old_mask.sum())
        # Kept and regrown weights are untouched, all others are zero.
        assert torch.equal(parameter.detach(), torch.where(mask & old_mask, old_values, 0.0))
        k = int(drop_fraction * cosine(step, 4) * int(old_mask.sum()))
        assert int((old_mask & ~mask).sum()) <= k
        with torch.no_grad():
            parameter.add_(torch.randint(0, 2, shape, generator=rng).to(dtype) * mask)
    assert dst.exploration_rate() == pytest.approx(int(ever.sum()) / max(1, ever.numel()))
