"""SET and RigL in a training loop: exploration, resuming, copies."""

import copy
import io
import math

import pytest
import torch
from method_seeds import seeded, updated_by_step
from torch import nn

from sparseopt_kernels.masks.mapping import Masks
from sparseopt_kernels.topology.rigl import RigL
from sparseopt_kernels.topology.set import SET
from sparseopt_kernels.topology.sparsify import sparsify

BOTH = pytest.mark.parametrize("cls", [SET, RigL])


def small_model(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2), nn.Flatten()
    )
    model.append(nn.Linear(4 * 49, 5))
    return model


def train(model, dst, optimizer, first, last):
    """Steps ``first`` to ``last`` on data that depends on the step alone."""
    for step in range(first, last):
        data = torch.Generator().manual_seed(step)
        x = torch.randn(4, 3, 8, 8, generator=data)
        y = torch.randint(5, (4,), generator=data)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        dst.step()
        optimizer.step()
        with torch.no_grad():
            for parameter, mask in dst.masks.items():
                parameter *= mask


class TestTraining:
    def build(self, cls, seed=0, memory_format=torch.contiguous_format):
        model = small_model()
        masks = sparsify(model, 0.8)
        model.to(memory_format=memory_format)
        dst = cls(masks, drop_fraction=0.5, update_every=2, stop_at=12, **seeded(cls, seed))
        return model, dst, torch.optim.SGD(model.parameters(), lr=0.1)

    @BOTH
    def test_every_layer_keeps_its_number_and_explores(self, cls):
        model, dst, optimizer = self.build(cls)
        masks = Masks(model)
        before = {name: int(masks[parameter].sum()) for name, parameter in masks.named().items()}
        first = {name: masks[parameter].clone() for name, parameter in masks.named().items()}
        rates = [dst.exploration_rate()]
        assert rates[0] == pytest.approx(1 - masks.sparsity())
        for step in range(14):
            train(model, dst, optimizer, step, step + 1)
            rates.append(dst.exploration_rate())
            for name, parameter in masks.named().items():
                assert int(masks[parameter].sum()) == before[name]
                assert not parameter[~masks[parameter]].any()
        assert rates == sorted(rates)
        assert rates[-1] > rates[0] + 0.05
        assert rates[11] == rates[14]
        for name, parameter in masks.named().items():
            assert not torch.equal(masks[parameter], first[name]), name

    @BOTH
    def test_a_run_can_be_repeated(self, cls):
        runs = [self.build(cls) for _ in range(2)]
        for model, dst, optimizer in runs:
            train(model, dst, optimizer, 0, 9)
            torch.rand(3)  # The global generator has no say.
        for left, right in zip(
            runs[0][0].state_dict().values(), runs[1][0].state_dict().values(), strict=True
        ):
            assert torch.equal(left, right)

    def test_set_draws_anew_for_every_layer_and_step(self):
        parameters = [nn.Parameter((torch.arange(400) < 200).float()) for _ in range(2)]
        dst = SET({p: p.detach() != 0 for p in parameters}, 1.0, 1, stop_at=math.inf)
        before = [mask.clone() for mask in dst.masks.values()]
        dst.step()
        first = [mask.clone() for mask in dst.masks.values()]
        assert not torch.equal(*first)
        for parameter, mask, initial in zip(parameters, dst.masks.values(), before, strict=True):
            mask.copy_(initial)
            with torch.no_grad():
                parameter.copy_(initial)
        dst.step()
        assert not torch.equal(next(iter(dst.masks.values())), first[0])

    def test_the_seed_matters_for_set(self):
        masks = []
        for seed in (0, 1):
            model, dst, optimizer = self.build(SET, seed)
            train(model, dst, optimizer, 0, 3)
            masks.append(model[0].weight_mask)
        assert not torch.equal(*masks)

    @BOTH
    def test_channels_last_changes_nothing(self, cls):
        masks = []
        for memory_format in (torch.contiguous_format, torch.channels_last):
            model, dst, _ = self.build(cls, memory_format=memory_format)
            for parameter in dst.masks:
                gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
                parameter.grad = torch.empty_like(parameter).copy_(gradient)
            dst.step()
            assert updated_by_step(dst) is True
            masks.append([model[0].weight_mask, model[3].weight_mask])
        assert masks[1][0].is_contiguous(memory_format=torch.channels_last)
        assert all(torch.equal(left, right) for left, right in zip(*masks, strict=True))

    @BOTH
    @pytest.mark.parametrize("stop", [3, 4, 7])
    def test_a_resume_is_bit_identical(self, cls, stop):
        whole_model, whole_dst, optimizer = self.build(cls)
        train(whole_model, whole_dst, optimizer, 0, 14)

        model, dst, optimizer = self.build(cls)
        train(model, dst, optimizer, 0, stop)
        file = io.BytesIO()
        torch.save([model.state_dict(), dst.state_dict()], file)
        file.seek(0)
        model_state, dst_state = torch.load(file, weights_only=True)

        model = small_model(seed=9)
        masks = sparsify(model, 0.8, seed=9)
        dst = cls(masks, drop_fraction=0.1, update_every=9, stop_at=99, **seeded(cls, 9))
        model.load_state_dict(model_state)
        dst.load_state_dict(dst_state)
        train(model, dst, torch.optim.SGD(model.parameters(), lr=0.1), stop, 14)
        for name, value in whole_model.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name
        assert dst.exploration_rate() == whole_dst.exploration_rate()

    @BOTH
    def test_bfloat16(self, cls):
        model = small_model()
        masks = sparsify(model, 0.8)
        model.bfloat16()
        nnz = masks.nnz()
        dst = cls(masks, 0.5, 1, stop_at=50)
        for step in range(3):
            for parameter in masks:
                parameter.grad = torch.randn(parameter.shape).bfloat16()
            assert updated_by_step(dst) is True, step
            assert masks.nnz() == nnz

    def test_a_copy_goes_its_own_way(self):
        model, dst, optimizer = self.build(RigL)
        train(model, dst, optimizer, 0, 3)
        model_copy, dst_copy = copy.deepcopy((model, dst))
        before = model_copy[0].weight_mask.clone()
        train(model, dst, optimizer, 3, 5)
        assert torch.equal(model_copy[0].weight_mask, before)
        train(model_copy, dst_copy, torch.optim.SGD(model_copy.parameters(), lr=0.1), 3, 5)
        assert torch.equal(model_copy[0].weight_mask, model[0].weight_mask)
