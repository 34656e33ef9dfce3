"""Masks that live in a model, and which weights and elements they concern."""

import copy
import io
import pickle
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparseopt_kernels.layers import maskable_weights, neurons_of
from sparseopt_kernels.masks import Masks, check_mask
from sparseopt_kernels.neurons import Neurons, correction_factors, fan_in
from sparseopt_kernels.topology.densities import layer_densities
from sparseopt_kernels.topology.seeding import generator
from sparseopt_kernels.topology.sparsify import sparsify


def make_model():
    """Two convolutions, a transposed one in groups and a classifier, with normalisation between."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 12, 3, groups=2))
    return nn.ModuleDict(
        {"body": body, "up": nn.ConvTranspose2d(12, 6, 3, groups=3), "fc": nn.Linear(20, 10)}
    )


NAMES = ["body.0.weight", "body.3.weight", "up.weight", "fc.weight"]


def masks_of(model):
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith("_mask")}


def assert_same(left, right):
    assert list(left) == list(right)
    for name in left:
        assert torch.equal(left[name], right[name]), name


def neurons_by_brute_force(layer):
    """Which output channel each weight feeds, seen from the outputs: one weight on at a time."""
    weight = layer.weight
    owner = torch.empty(weight.shape, dtype=torch.long)
    spatial = weight.dim() - 2
    channels = layer.in_features if spatial == 0 else layer.in_channels
    x = torch.ones(1, channels, *[5] * spatial)
    with torch.no_grad():
        for index in range(weight.numel()):
            weight.zero_()
            weight.view(-1)[index] = 1.0
            out = layer(x).flatten(2).sum(2).flatten() if spatial else layer(x).flatten()
            owner.view(-1)[index] = out.argmax()
    return owner


LAYERS = {
    "linear": lambda: nn.Linear(7, 5, bias=False),
    "conv1d": lambda: nn.Conv1d(4, 6, 3, bias=False),
    "conv2d_groups": lambda: nn.Conv2d(4, 6, (2, 3), groups=2, bias=False),
    "conv2d_depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False),
    "conv3d": lambda: nn.Conv3d(2, 3, 2, bias=False),
    "transpose1d": lambda: nn.ConvTranspose1d(4, 6, 3, bias=False),
    "transpose2d_groups": lambda: nn.ConvTranspose2d(6, 4, (2, 3), groups=2, bias=False),
    "transpose2d_depthwise": lambda: nn.ConvTranspose2d(4, 4, 3, groups=4, bias=False),
    "transpose3d": lambda: nn.ConvTranspose3d(2, 3, 2, bias=False),
}


class TestLayers:
    def test_what_is_maskable(self):
        model = make_model()
        assert [weight.name for weight in maskable_weights(model)] == NAMES
        for name, module, attribute, parameter, _ in maskable_weights(model):
            assert getattr(module, attribute) is parameter is model.get_parameter(name)

    def test_a_bare_layer(self):
        assert [weight.name for weight in maskable_weights(nn.Linear(3, 4))] == ["weight"]

    def test_a_shared_weight_comes_once_under_its_first_name(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        model[2].weight = model[0].weight
        assert [weight.name for weight in maskable_weights(model)] == ["0.weight", "1.weight"]

    def test_embeddings_and_normalisation_are_not_maskable(self):
        model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.BatchNorm1d(4))
        assert list(maskable_weights(model)) == []

    def test_a_layer_that_computes_its_weight_is_left_out(self):
        model = nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)),
            nn.Linear(4, 2),
        )
        with pytest.warns(UserWarning, match="layer '[01]' is left out: its weight is not a parameter"):
            assert [weight.name for weight in maskable_weights(model)] == ["2.weight"]

    @pytest.mark.parametrize(
        ("exclude", "left"),
        [
            (["fc"], NAMES[:3]),
            (["fc.weight"], NAMES[:3]),
            (["body.*"], NAMES[2:]),
            (["body.?"], NAMES[2:]),
            (("up", "fc"), NAMES[:2]),
            (["*"], []),
        ],
    )
    def test_exclude(self, exclude, left):
        assert [weight.name for weight in maskable_weights(make_model(), exclude)] == left

    def test_a_pattern_without_a_match_is_an_error(self):
        with pytest.raises(ValueError, match=r"exclude has 'body\.1', which matches no maskable weight"):
            list(maskable_weights(make_model(), ["fc", "body.1"]))

    def test_one_string_is_not_a_sequence_of_names(self):
        with pytest.raises(TypeError, match=r"use exclude=\('fc',\)"):
            list(maskable_weights(make_model(), "fc"))

    def test_a_lazy_layer_must_be_initialised(self):
        model = nn.Sequential(nn.LazyLinear(4))
        with pytest.raises(ValueError, match=r"'0\.weight' is not initialised yet"):
            list(maskable_weights(model))
        assert list(maskable_weights(model, ["0"])) == []

    @pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
    def test_fan_in_against_the_outputs_that_the_weights_reach(self, make):
        layer = make()
        torch.manual_seed(0)
        mask = torch.rand(layer.weight.shape) < 0.4
        neurons = neurons_of(layer)
        owner = neurons_by_brute_force(layer)
        outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        expected = torch.bincount(owner[mask], minlength=outputs)
        assert fan_in(mask, neurons).dtype == torch.int64
        assert fan_in(mask, neurons).tolist() == expected.tolist()
        _, segments, _, length = neurons.grid(mask.shape)
        assert segments * length == layer.weight.numel() // outputs

    @pytest.mark.parametrize("shape", [(), (5,), (0, 4), (4, 0), (3, 2, 1)])
    def test_fan_in_of_odd_shapes(self, shape):
        mask = torch.ones(shape, dtype=torch.bool)
        rows = shape[0] if shape else 1
        assert fan_in(mask, Neurons()).tolist() == [mask.numel() // max(rows, 1)] * rows

    def test_fan_in_in_any_memory_format(self):
        mask = torch.rand(6, 4, 3, 3) < 0.5
        as_nhwc = mask.to(memory_format=torch.channels_last)
        for neurons in (Neurons(), Neurons(dim=1, groups=2)):
            assert torch.equal(fan_in(as_nhwc, neurons), fan_in(mask, neurons))


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
        assert masks.fan_in(model[0].weight).float().std() > 2

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
        assert not torch.equal(model[0].weight_mask, model[1].weight_mask)

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


class TestMasks:
    def make(self):
        model = make_model()
        return model, sparsify(model, 0.8)

    def test_it_is_a_mapping_in_model_order(self):
        model, masks = self.make()
        assert isinstance(masks, Mapping)
        assert len(masks) == 4
        assert list(masks.named()) == NAMES
        assert [id(p) for p in masks] == [id(model.get_parameter(name)) for name in NAMES]
        assert masks[model["fc"].weight] is model["fc"].weight_mask
        assert model["fc"].weight in masks
        assert model["fc"].bias not in masks
        assert masks.get(model["fc"].bias) is None
        with pytest.raises(KeyError):
            masks[model["fc"].bias]

    def test_comparison_and_hash_are_by_identity(self):
        model, masks = self.make()
        assert masks == masks
        assert masks != Masks(model)
        assert {masks: 1}[masks] == 1

    def test_counts(self):
        model, masks = self.make()
        total = sum(int(mask.sum()) for mask in masks_of(model).values())
        numel = sum(parameter.numel() for parameter in masks)
        assert masks.nnz() == total
        assert masks.sparsity() == pytest.approx(1 - total / numel)
        assert repr(masks) == f"Masks(4 parameters, {total} active weights, sparsity {1 - total / numel:.4f})"

    def test_fan_in_goes_by_the_layer(self):
        model, masks = self.make()
        fan_in_of_fc = masks.fan_in(model["fc"].weight)
        assert torch.equal(fan_in_of_fc, model["fc"].weight_mask.sum(1))
        assert masks.neurons(model["fc"].weight) == Neurons()
        assert masks.neurons(model["up"].weight) == Neurons(dim=1, groups=3)
        assert masks.fan_in(model["up"].weight).shape == (6,)

    def test_writes_in_place_and_replaced_buffers_are_seen(self):
        model, masks = self.make()
        model["fc"].weight_mask.fill_(True)
        assert masks[model["fc"].weight].all()
        model["fc"].weight_mask = torch.zeros(10, 20, dtype=torch.bool)
        assert not masks[model["fc"].weight].any()

    def test_the_masks_are_in_the_state_dict(self):
        model, masks = self.make()
        state = model.state_dict()
        assert [name for name in state if name.endswith("_mask")] == [f"{name}_mask" for name in NAMES]
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        other = make_model()
        other_masks = sparsify(other, 0.8, seed=1)
        other.load_state_dict(torch.load(file, weights_only=True))
        for mine, theirs in zip(masks.values(), other_masks.values(), strict=True):
            assert theirs.dtype == torch.bool
            assert torch.equal(mine, theirs)

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    def test_a_copied_model_can_be_adopted(self, duplicate):
        model, masks = self.make()
        twin = duplicate(model)
        twin_masks = Masks(twin)
        assert list(twin_masks.named()) == NAMES
        twin["fc"].weight_mask.fill_(True)
        assert twin_masks[twin["fc"].weight].all()
        assert not masks[model["fc"].weight].all()
        assert model["fc"].weight not in twin_masks

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    def test_masks_copied_with_their_model_belong_to_the_copy(self, duplicate):
        model, masks = self.make()
        twin, twin_masks = duplicate((model, masks))
        assert twin_masks[twin["fc"].weight] is twin["fc"].weight_mask
        assert model["fc"].weight not in twin_masks
        assert twin_masks.nnz() == masks.nnz()

    @pytest.mark.parametrize(
        "arguments",
        [
            {"dtype": torch.bfloat16},
            {"dtype": torch.float64},
            {"memory_format": torch.channels_last},
            {"device": "cpu"},
        ],
        ids=str,
    )
    def test_to(self, arguments):
        model, masks = self.make()
        before = {name: mask.clone() for name, mask in masks_of(model).items()}
        model.to(**arguments)
        assert_same(masks_of(model), before)
        for parameter, mask in masks.items():
            assert mask.dtype == torch.bool
            assert mask.stride() == parameter.stride()

    def test_a_mask_registered_by_hand_is_found(self):
        model = make_model()
        model["fc"].register_buffer("weight_mask", torch.rand(10, 20) < 0.5)
        model["fc"].register_buffer("bias_mask", torch.ones(10, dtype=torch.bool))
        assert list(Masks(model).named()) == ["fc.weight", "fc.bias"]

    def test_no_mask_is_an_error(self):
        with pytest.raises(ValueError, match=r"the model has no mask: call sparsify"):
            Masks(make_model())

    @pytest.mark.parametrize(
        ("mask", "message"),
        [
            (torch.ones(20, 10, dtype=torch.bool), r"'fc\.weight' has shape \(20, 10\), .* has \(10, 20\)"),
            (torch.ones(10, 20), r"'fc\.weight' has dtype torch\.float32, it must be torch\.bool"),
            (torch.ones(10, 20, dtype=torch.bool, device="meta"), r"'fc\.weight' is on meta, .* is on cpu"),
        ],
    )
    def test_an_unfit_mask_is_an_error(self, mask, message):
        model = make_model()
        model["fc"].register_buffer("weight_mask", mask)
        with pytest.raises(ValueError, match=message):
            Masks(model)

    def test_check_mask_wants_a_tensor(self):
        with pytest.raises(ValueError, match="mask for 'w' is a list, it must be a boolean tensor"):
            check_mask([True], torch.ones(1), "w")


@settings(max_examples=100, deadline=None)
@given(
    key=st.tuples(*[st.integers(0, 2)] * 3),
    other=st.tuples(*[st.integers(0, 2)] * 3),
)
def test_a_generator_depends_on_all_three_and_on_nothing_else(key, other):
    def draw(key):
        return torch.randint(2**60, (4,), generator=generator(*key)).tolist()

    assert draw(key) == draw(key)
    assert (draw(key) == draw(other)) == (key == other)


def test_generators_are_the_same_on_every_machine():
    # Python's hash() would differ from process to process.
    assert generator(0, 0, 0).initial_seed() == 9617123944752223253
    assert generator(1, 2, 3).initial_seed() == 2276728233556386152


class TestCorrectionFactors:
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)

    @pytest.mark.parametrize(
        ("correction", "squares"),
        [("layer", [2.0, 0.5, 0.0, 1.5]), ("unnormalized", [1.0, 0.25, 0.0, 0.75]), ("none", [1.0] * 4)],
    )
    def test_by_hand(self, correction, squares):
        factors = correction_factors(self.mask, Neurons(), correction)
        assert torch.equal(factors, torch.tensor(squares, dtype=torch.float64).sqrt().view(4, 1))

    @pytest.mark.parametrize("fan_in", range(1, 100))
    def test_exactly_one_for_equal_fan_in(self, fan_in):
        mask = (torch.arange(100) < fan_in).expand(7, 100)
        assert torch.equal(correction_factors(mask, Neurons()), torch.ones(7, 1, dtype=torch.float64))

    def test_an_empty_mask_gives_no_nan(self):
        empty = torch.zeros(3, 4, dtype=torch.bool)
        assert not correction_factors(empty, Neurons()).isnan().any()

    def test_transposed_convolution_with_groups(self):
        torch.manual_seed(0)
        mask = torch.rand(6, 2, 3, 3) < 0.3  # in 6, out 4, two groups
        factors = correction_factors(mask, Neurons(dim=1, groups=2))
        assert factors.shape == (6, 2, 1, 1)
        mean = int(mask.sum()) / 4
        for group in range(2):
            for j in range(2):
                rows = slice(3 * group, 3 * group + 3)
                expected = (int(mask[rows, j].sum()) / mean) ** 0.5
                assert factors[rows, j].flatten().tolist() == pytest.approx([expected] * 3)
