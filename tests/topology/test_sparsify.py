"""Random masks: their numbers, their seed, and what is refused."""

import copy

import pytest
import torch
from masked_model import NAMES, assert_same, make_model, masks_of
from torch import nn

from sparseopt_kernels.masks import Masks
from sparseopt_kernels.topology.densities import layer_densities
from sparseopt_kernels.topology.sparsify import sparsify


class TestSparsify:
    @pytest.mark.parametrize("distribution", ["erk", "er", "uniform"])
    def test_every_layer_has_exactly_its_number(self, distribution):
        model = make_model()
        densities = layer_densities(model, 0.8, distribution)
        masks = sparsify(model, 0.8, distribution)
        for name, parameter in masks.named().items():
            assert int(masks[parameter].sum()) == round(densities[name] * parameter.numel())
        assert masks.sparsity() == pytest.approx(0.8, abs=len(masks) / sum(p.numel() for p in masks))

    def test_what_is_masked_is_zero_and_the_rest_is_untouched(self):
        model = make_model()
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        masks = sparsify(model, 0.8, "uniform")
        for name, parameter in model.named_parameters():
            mask = masks.get(parameter, torch.tensor(True))
            assert torch.equal(parameter, torch.where(mask, before[name], 0.0)), name
        assert [name for name, parameter in model.named_parameters() if parameter in masks] == NAMES

    def test_the_fan_in_differs_from_neuron_to_neuron(self):
        model = nn.Sequential(nn.Linear(200, 100))
        masks = sparsify(model, 0.9)
        assert masks.fan_in(model.get_parameter("0.weight")).float().std() > 2

    def test_the_seed_alone_decides(self):
        first, second, other = make_model(), make_model(), make_model()
        sparsify(first, 0.8, seed=3)
        torch.rand(5)
        sparsify(second, 0.8, seed=3)
        sparsify(other, 0.8, seed=4)
        assert_same(masks_of(first), masks_of(second))
        for name, mask in masks_of(first).items():
            assert not torch.equal(mask, masks_of(other)[name]), name

    def test_layers_of_equal_shape_get_different_masks(self):
        model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
        sparsify(model, 0.5)
        assert not torch.equal(*masks_of(model).values())

    def test_the_global_generator_is_left_alone(self):
        state = torch.get_rng_state()
        sparsify(nn.Sequential(nn.Linear(4, 4)), 0.5)
        # Making the layer draws; the masks do not.
        torch.set_rng_state(state)
        nn.Linear(4, 4)
        expected = torch.rand(3)
        torch.set_rng_state(state)
        sparsify(nn.Sequential(nn.Linear(4, 4)), 0.5)
        assert torch.equal(torch.rand(3), expected)

    def test_exclude(self):
        model = make_model()
        assert list(sparsify(model, 0.8, exclude=["fc", "body.0"]).named()) == ["body.3.weight", "up.weight"]
        assert list(masks_of(model)) == ["body.3.weight_mask", "up.weight_mask"]

    def test_sparsity_zero(self):
        masks = sparsify(make_model(), 0.0)
        assert masks.sparsity() == 0.0
        assert all(mask.all() for mask in masks.values())

    def test_a_shared_weight_has_one_mask(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = model[0].weight
        assert len(sparsify(model, 0.5)) == 1
        assert list(masks_of(model)) == ["0.weight_mask"]
        assert len(Masks(model)) == 1

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"sparsity": 1.0}, r"sparsity is 1\.0, it must be in \[0, 1\)"),
            ({"sparsity": float("nan")}, "sparsity is nan"),
            ({"sparsity": 0.5, "distribution": "random"}, "distribution is 'random', it must be one of"),
            ({"sparsity": 0.5, "exclude": ["nope"]}, "exclude has 'nope', which matches no maskable weight"),
            ({"sparsity": 0.5, "exclude": ["*"]}, "nothing to mask"),
        ],
    )
    def test_a_refused_call_leaves_the_model_alone(self, arguments, message):
        model = make_model()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=message):
            sparsify(model, **arguments)
        assert_same(model.state_dict(), before)

    def test_a_masked_model_is_refused(self):
        model = make_model()
        sparsify(model, 0.5, exclude=["body.*"])
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=r"'up\.weight' has a mask already \(weight_mask\): use"):
            sparsify(model, 0.5)
        assert_same(model.state_dict(), before)
        assert list(sparsify(model, 0.5, exclude=["up", "fc"]).named()) == NAMES
