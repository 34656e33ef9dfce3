"""Which optimizers leave out the step that follows an update of the masks, and how often."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from ranks import on_ranks
from side_by_side import same_bits
from topology_training import Training

from sparseopt_kernels.masks.mapping import Masks
from sparseopt_kernels.skipped_steps import pending_skips
from sparseopt_kernels.topology.rigl import RigL


class TestWhichOptimizers:
    def setup_method(self) -> None:
        self.training = Training(momentum=0.0)

    def skips(self, masks: Any, parameters: Any = None) -> bool:
        """Whether an optimizer with these masks leaves out the step after an update."""
        training = self.training
        training.opt = training.optimizer(masks, parameters=parameters, momentum=0.0)
        training.to_update()
        owned = [p for group in training.opt.param_groups for p in group["params"]]
        before = [torch.where(masks.get(p, torch.tensor(True)), p.detach(), 0.0) for p in owned]
        training.opt.step()
        return all(map(same_bits, [p.detach() for p in owned], before))

    def test_one_that_has_a_share_of_the_parameters(self) -> None:
        bias = self.training.model.get_parameter("3.bias")
        assert self.skips(self.training.masks, parameters=[bias])

    def test_one_with_another_mapping(self) -> None:
        assert self.skips(dict(self.training.masks))

    def test_one_with_masks_of_the_model_found_again(self) -> None:
        assert self.skips(Masks(self.training.model))

    def test_one_with_views_of_the_masks(self) -> None:
        assert self.skips({p: mask.view(mask.shape) for p, mask in self.training.masks.items()})

    @pytest.mark.parametrize("layer", [0, 1])
    def test_one_with_one_of_the_masks(self, layer: int) -> None:
        p, mask = [*self.training.masks.items()][layer]
        assert self.skips({p: mask})

    def test_one_with_the_memory_of_the_masks_through_numpy(self) -> None:
        assert self.skips({p: torch.from_numpy(mask.numpy()) for p, mask in self.training.masks.items()})

    def test_not_one_with_numbers_in_the_memory_of_the_masks(self) -> None:
        opt, pairs = self.training.opt, self.training.masks.items()
        self.training.to_update()
        assert pending_skips(opt, {p: mask.view(torch.uint8) for p, mask in pairs}) == []
        assert len(pending_skips(opt, {p: mask.view(torch.bool) for p, mask in pairs})) == 1

    def test_not_one_with_masks_of_its_own(self) -> None:
        assert not self.skips({p: mask.clone() for p, mask in self.training.masks.items()})

    def test_not_one_without_masks(self) -> None:
        assert not self.skips({}, parameters=[self.training.model.get_parameter("3.bias")])

    def test_each_once(self) -> None:
        training = self.training
        weights, others = [*training.masks], [p for p in training.model.parameters() if p.ndim == 1]
        two = [training.optimizer(parameters=own) for own in (weights, others)]
        training.to_update()
        for own in two:
            assert not training.steps(own.step)
        for own in two:
            assert training.steps(own.step)

    def test_two_topologies_at_once_cost_one_step(self) -> None:
        training = self.training
        first, last = training.masks
        dst = [RigL(training.masks.subset([p]), 0.3, 1, stop_at=9) for p in (first, last)]
        training.backward()
        training.opt.step()
        training.backward()
        for own in dst:
            own.step()
        assert not training.steps(training.opt.step)
        assert training.steps(training.opt.step)
        training.backward()
        dst[1].step()
        assert not training.steps(training.opt.step)

    @pytest.mark.parametrize("when", ["before the step", "after it"])
    def test_not_a_copy(self, when: str) -> None:
        training = self.training
        training.to_update()
        if when == "after it":
            training.opt.step()
        copied = copy.copy(training.opt)
        assert training.steps(copied.step)
        assert (when == "before the step") != training.steps(training.opt.step)


def test_an_optimizer_that_is_made_later_leaves_nothing_out() -> None:
    """The update is over: a second phase of training begins with a step."""
    training = Training()
    training.to_update()
    training.opt.step()
    del training.opt
    gc.collect()  # it left out the step, also if it is gone
    training.opt = training.optimizer()
    training.backward()
    assert training.steps(training.opt.step)


def test_an_optimizer_that_is_made_for_the_step() -> None:
    """In place of another, to forget its momentum: the gradient is that which has chosen the masks."""
    training = Training()
    training.to_update()
    training.opt = training.optimizer()
    assert not training.steps(training.opt.step)


ZERO = """
from torch.distributed.optim import ZeroRedundancyOptimizer
import sparseopt_kernels as sk
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 10))
masks = sk.sparsify(model, 0.8)
opt = ZeroRedundancyOptimizer(
    model.parameters(), sk.SparseOpt, lr=0.1, masks=masks, max_grad_norm=1.0, max_grad_norm_over="dense"
)
dst = sk.RigL(masks, update_every=3, stop_at=100)
result = []
for step in range(1, 10):
    torch.manual_seed(step)
    loss = model(torch.randn(8, 30)).square().mean()
    model.zero_grad()
    loss.backward()
    dst.step()
    before = [p.detach() * masks.get(p, torch.tensor(True)) for p in model.parameters()]
    opt.step()
    result.append(all(map(torch.equal, before, [p.detach() for p in model.parameters()])))
"""


@pytest.mark.slow
def test_shares_of_zero(tmp_path: Any) -> None:
    for skipped in on_ranks(ZERO, tmp_path):
        assert skipped == [step % 3 == 0 for step in range(1, 10)]
