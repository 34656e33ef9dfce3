"""Random masks: their numbers, their seed, and what is refused."""

import copy
import warnings

import pytest
import torch
from hugging_face import Conv1D
from masked_model import NAMES, assert_same, make_model, masks_of
from torch import nn

from sparseopt_kernels.masks.mapping import Masks
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


def all_the_same(model, before):
    """Whether a model has the same tensors as before, and no other attribute."""
    assert_same(model.state_dict(), before.state_dict())
    for ours, theirs in zip(model.modules(), before.modules(), strict=True):
        assert dir(ours) == dir(theirs)


class TestNothingIsWrittenBeforeAllIsChecked:
    @pytest.mark.parametrize(
        ("foreign", "kind"),
        [
            (
                lambda layer: layer.register_buffer("weight_mask", torch.rand(10, 20)),
                r"torch\.float32 tensor",
            ),
            (lambda layer: layer.register_buffer("weight_mask", torch.rand(3) < 0.5), r"torch\.bool tensor"),
            (lambda layer: layer.register_buffer("weight_mask", None), "NoneType"),
            (lambda layer: setattr(layer, "weight_mask", nn.Linear(1, 1)), "Linear"),
            (lambda layer: setattr(layer, "weight_mask", "x"), "str"),
        ],
    )
    def test_a_layer_with_another_weight_mask(self, foreign, kind):
        model = make_model()
        foreign(model["fc"])
        before = copy.deepcopy(model)
        with pytest.raises(ValueError, match=rf"'fc\.weight' cannot be masked: .* weight_mask .* \({kind}\)"):
            sparsify(model, 0.5)
        all_the_same(model, before)

    def test_a_float_buffer_beside_the_bias_is_the_users(self):
        model = make_model()
        model["fc"].register_buffer("bias_mask", torch.rand(10))
        before = model["fc"].bias_mask.clone()
        masks = sparsify(model, 0.5)
        assert list(masks.named()) == NAMES
        assert torch.equal(model["fc"].bias_mask, before)

    def test_masks_that_were_there_are_checked_too(self):
        model = make_model()
        model["fc"].register_buffer("weight_mask", torch.rand(3) < 0.5)
        before = copy.deepcopy(model)
        with pytest.raises(ValueError, match=r"'fc\.weight' has shape \(3,\)"):
            sparsify(model, 0.5, exclude=["fc"])
        all_the_same(model, before)

    def test_a_warning_that_is_an_error(self):
        model = nn.ModuleDict({"emb": nn.Embedding(5, 4), "fc": nn.Linear(4, 4)})
        before = copy.deepcopy(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match="left dense"):
                sparsify(model, 0.5)
        all_the_same(model, before)

    @pytest.mark.filterwarnings("ignore:.*no active weight")
    def test_a_weight_that_cannot_be_written(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        with torch.inference_mode():
            model[1].weight = nn.Parameter(torch.ones(4, 4))
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
            sparsify(model, 0.5)
        assert_same(model.state_dict(), before)

    def test_elements_that_share_memory(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = nn.Parameter(torch.randn(1, 4).expand(4, 4))
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=r"elements of '1\.weight' share memory .*: clone it"):
            sparsify(model, 0.5)
        assert_same(model.state_dict(), before)

    def test_a_layout_that_has_no_mask(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = nn.Parameter(torch.randn(4, 4).to_sparse())
        with pytest.raises(
            ValueError, match=r"'1\.weight' has layout torch\.sparse_coo, it must be torch\.str"
        ):
            sparsify(model, 0.5)
        assert masks_of(model) == {}
        assert model.get_parameter("0.weight").all()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"init": "largest"}, r"init is 'largest', it must be one of \('random', 'magnitude'\)"),
            ({"min_fan_in": -1}, "min_fan_in is -1, it must be an integer of at least 0"),
            ({"min_fan_in": 1.5}, r"min_fan_in is 1\.5, it must be an integer"),
            ({"min_fan_in": True}, "min_fan_in is True, it must be an integer"),
            (
                {"min_fan_in": 28},
                r"min_fan_in is 28, but a neuron of 'body\.0\.weight' has only 27 weights: lower min_fan_in",
            ),
            (
                {"min_fan_in": 11, "exclude": ["body.*", "up"]},
                r"min_fan_in is 11: the 10 neurons of 'fc\.weight' need 110 active weights, but it gets 100 "
                r"of its 200\. Lower min_fan_in or the sparsity",
            ),
            (
                {"min_fan_in": 19, "exclude": ["body.*", "fc"]},
                r"the 6 neurons of 'up\.weight' need 114 active weights, but it gets 108 of its 216",
            ),
            ({"include": ["nope"]}, "include has 'nope', which matches no maskable weight"),
        ],
    )
    def test_arguments(self, options, message):
        model = make_model()
        before = copy.deepcopy(model)
        with pytest.raises(ValueError, match=message):
            sparsify(model, 0.5, "uniform", **options)
        all_the_same(model, before)

    def test_the_most_that_fits(self):
        assert int(sparsify(make_model(), {"up": 0.5}, min_fan_in=18).nnz()) == 108

    def test_the_meta_device(self):
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        assert list(layer_densities(model, 0.5)) == ["0.weight", "1.weight"]
        with pytest.raises(
            ValueError, match=r"'0\.weight' is on the meta device.* call sparsify after .*to_empty"
        ):
            sparsify(model, 0.5)
        assert masks_of(model) == {}
        model.to_empty(device="cpu")
        nn.init.normal_(model.get_parameter("0.weight"))
        assert len(sparsify(model, 0.5)) == 2

    def test_a_layer_on_the_meta_device_that_is_not_masked(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta"))
        assert len(sparsify(model, 0.5, exclude=["1"])) == 1


class TestSharedMemory:
    def model(self, view):
        model = nn.ModuleDict({"encoder": nn.Linear(6, 6), "decoder": nn.Linear(6, 6)})
        model["decoder"].weight.data = view(model["encoder"].weight.data)
        return model

    @pytest.mark.parametrize("view", [lambda w: w, torch.t], ids=["same", "transposed"])
    def test_two_parameters_of_one_memory(self, view):
        model = self.model(view)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(
            ValueError,
            match=r"'encoder\.weight' and 'decoder\.weight' share memory, .* Share the parameter itself",
        ):
            sparsify(model, 0.5)
        assert_same(model.state_dict(), before)

    def test_one_of_them_has_a_mask_already(self):
        model = self.model(torch.t)
        with pytest.warns(UserWarning, match="share memory"):
            sparsify(model, {"encoder": 0.5})
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=r"'encoder\.weight' and 'decoder\.weight' share memory"):
            sparsify(model, {"decoder": 0.5})
        assert_same(model.state_dict(), before)

    def test_one_of_them_is_excluded(self):
        model = self.model(torch.t)
        with pytest.warns(
            UserWarning, match=r"share memory, .* only one of them is masked: the mask zeroes the ot"
        ):
            masks = sparsify(model, 0.5, exclude=["decoder"])
        assert torch.equal(model["decoder"].weight != 0, masks[model["encoder"].weight].t())

    @pytest.mark.parametrize(
        "make",
        [
            lambda base: (base[:4], base[4:]),
            lambda base: (base[:, :4], base[:, 4:]),
        ],
        ids=["rows", "columns"],
    )
    def test_parts_of_one_storage_are_no_shared_memory(self, make):
        model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
        for layer, part in zip(model, make(torch.randn(8, 8)), strict=True):
            layer.weight.data = part
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(sparsify(model, 0.5)) == 2

    def test_the_parameter_itself_may_be_shared(self):
        model = nn.ModuleDict({"encoder": nn.Linear(6, 6), "decoder": nn.Linear(6, 6)})
        model["decoder"].weight = model["encoder"].weight
        assert len(sparsify(model, 0.5)) == 1


class TestInclude:
    def test_buffers_lie_beside_their_attributes(self):
        model = nn.ModuleDict(
            {"attn": nn.MultiheadAttention(8, 2), "rnn": nn.LSTM(8, 6), "conv1d": Conv1D(5, 8)}
        )
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        masks = sparsify(
            model, 0.5, "uniform", include=("*in_proj_weight", "rnn.weight_ih*", "conv1d"), exclude=["*_hh*"]
        )
        assert list(masks_of(model)) == [
            "attn.in_proj_weight_mask",
            "attn.out_proj.weight_mask",
            "rnn.weight_ih_l0_mask",
            "conv1d.weight_mask",
        ]
        for name, parameter in masks.named().items():
            mask = masks[parameter]
            assert int(mask.sum()) == parameter.numel() // 2
            assert torch.equal(parameter, before[name] * mask)
        assert len(masks.fan_in(model.get_parameter("conv1d.weight"))) == 5
        assert len(masks.fan_in(model.get_parameter("attn.in_proj_weight"))) == 24
        x = torch.randn(3, 2, 8)
        for output in (model["attn"](x, x, x)[0], model["rnn"](x)[0]):
            assert output.isfinite().all()

    def test_layer_densities_agrees(self):
        model = nn.ModuleDict({"emb": nn.Embedding(30, 8), "fc": nn.Linear(8, 8), "head": nn.Linear(8, 3)})
        densities = layer_densities(model, 0.7, exclude=["head"], include=["emb"])
        masks = sparsify(model, 0.7, exclude=["head"], include=["emb"])
        assert densities == layer_densities({"emb.weight": (30, 8), "fc.weight": (8, 8)}, 0.7)
        assert {name: int(masks[p].sum()) for name, p in masks.named().items()} == {
            name: round(density * model.get_parameter(name).numel()) for name, density in densities.items()
        }

    def test_of_shapes_all_count(self):
        shapes = {"a": (4, 4), "b": (5, 4)}
        assert layer_densities(shapes, 0.5, include=["b"]) == layer_densities(shapes, 0.5)
        with pytest.raises(ValueError, match="include has 'c', which matches no maskable weight"):
            layer_densities(shapes, 0.5, include=["c"])
