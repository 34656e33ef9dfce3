"""SET and RigL in a training loop: when masks change, what is zeroed, resuming, bad input."""

import copy
import io
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparseopt_kernels.masks import Masks
from sparseopt_kernels.topology.drop_schedules import cosine
from sparseopt_kernels.topology.dynamic import SET, RigL
from sparseopt_kernels.topology.sparsify import sparsify


def seeded(cls, seed):
    """The seed for SET; RigL has none."""
    return {"seed": seed} if cls is SET else {}


def updated_by_step(dst):
    dst.step()
    return dst.updated


BOTH = pytest.mark.parametrize("cls", [SET, RigL])


def bits(text):
    return torch.tensor([character == "1" for character in text.replace(" ", "")])


def parameter_with(values, gradient=None, dtype=torch.float32):
    parameter = nn.Parameter(torch.tensor(values, dtype=dtype))
    if gradient is not None:
        parameter.grad = torch.tensor(gradient, dtype=dtype)
    return parameter


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
        version = self.mask._version
        assert updated_by_step(self.make(RigL)) is False
        assert self.mask._version == version
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
            version = self.mask._version
            self.parameter.grad = torch.randn(400)
            changed = updated_by_step(dst)
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
        weight = model[0].weight
        mask = torch.tensor([[[1], [1], [0]], [[1], [0], [0]]], dtype=torch.bool)
        model[0].register_buffer("weight_mask", mask)
        with torch.no_grad():
            weight.copy_(torch.tensor([[[5.0], [6], [0]], [[1], [0], [0]]]))
        # Fan-in 2, 1, 0. The first drops; it is free again with c = sqrt(2), (1, 1) with 1, the others 0.
        weight.grad = torch.tensor([[[0.0], [0], [9]], [[3], [4], [9]]])
        dst = RigL(Masks(model), 0.34, 1, stop_at=math.inf, regrow="corrected")
        dst.step()
        assert mask.flatten().tolist() == bits("110 100").tolist()


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


@BOTH
class TestBadInput:
    def make(self, cls, masks=None, **options):
        if masks is None:
            masks = {nn.Parameter(torch.ones(3)): torch.ones(3, dtype=torch.bool)}
        return cls(masks, **{"stop_at": 10, **options})

    @pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
    def test_drop_fraction(self, cls, value):
        with pytest.raises(ValueError, match=rf"drop_fraction is {value}, it must be in \[0, 1\]"):
            self.make(cls, drop_fraction=value)

    @pytest.mark.parametrize("value", [0, -5, 2.5, math.nan])
    def test_update_every(self, cls, value):
        with pytest.raises(ValueError, match=f"update_every is {value}, it must be an integer of at least 1"):
            self.make(cls, update_every=value)

    @pytest.mark.parametrize("value", [0, -1, math.nan])
    def test_stop_at(self, cls, value):
        with pytest.raises(ValueError, match=f"stop_at is {value}, it must be positive"):
            self.make(cls, stop_at=value)

    def test_masks(self, cls):
        with pytest.raises(ValueError, match="masks is empty"):
            self.make(cls, {})
        parameter = nn.Parameter(torch.ones(2, 3))
        with pytest.raises(ValueError, match=r"'parameter 0' has shape \(3, 2\), the parameter has \(2, 3\)"):
            self.make(cls, {parameter: torch.ones(3, 2, dtype=torch.bool)})
        with pytest.raises(ValueError, match=r"has dtype torch\.float32, it must be torch\.bool"):
            self.make(cls, {parameter: torch.ones(2, 3)})


def test_unknown_regrow():
    with pytest.raises(ValueError, match="regrow is 'best', it must be 'original' or 'corrected'"):
        RigL({nn.Parameter(torch.ones(3)): bits("111")}, stop_at=10, regrow="best")


def test_rigl_has_no_seed():
    masks = {nn.Parameter(torch.ones(3)): bits("111")}
    with pytest.raises(TypeError, match="seed"):
        RigL(masks, stop_at=200, seed=0)
    assert "seed" not in RigL(masks, stop_at=200).state_dict()
    assert "seed" in SET(masks, stop_at=200).state_dict()
    with pytest.raises(ValueError, match=r"state_dict has keys .*'seed'.*, it must have"):
        RigL(masks, stop_at=200).load_state_dict({**RigL(masks, stop_at=200).state_dict(), "seed": 0})


def test_the_order_of_imports_does_not_matter():
    program = """
import importlib, sys
for module in ("topology.dynamic", "topology.mask_update", "topology.densities", "masks"):
    importlib.import_module("sparseopt_kernels." + module)
    for name in [name for name in sys.modules if name.startswith("sparseopt_kernels")]:
        del sys.modules[name]
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("method", [SET, RigL])
def test_masks_that_will_never_change_are_warned_of(method):
    layer = nn.Linear(4, 4)
    masks = {layer.weight: torch.eye(4, dtype=torch.bool)}
    with pytest.warns(UserWarning, match="the masks will never change"):
        method(masks, update_every=100, stop_at=60.75)
