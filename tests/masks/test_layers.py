"""Which weights can be masked, and where their neurons lie."""

import re
import warnings

import pytest
import torch
from hugging_face import Conv1D
from masked_model import NAMES, make_model
from torch import nn
from torch.nn.utils import prune

from sparseopt_kernels.masks.layers import maskable_weights, neurons_of
from sparseopt_kernels.neurons import Neurons, fan_in


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


class TestNames:
    """All names of a shared weight find it."""

    def model(self):
        model = nn.ModuleDict({"wte": nn.Embedding(9, 4), "fc": nn.Linear(4, 4), "head": nn.Linear(4, 9)})
        model["head"].weight = model["wte"].weight
        return model

    def test_a_weight_is_found_at_its_usual_place(self):
        assert [weight.name for weight in maskable_weights(self.model())] == ["fc.weight", "head.weight"]

    @pytest.mark.parametrize("name", ["wte", "wte.weight", "head", "head.weight", "h*", "w*"])
    def test_it_is_excluded_by_any_of_them(self, name):
        assert [weight.name for weight in maskable_weights(self.model(), [name])] == ["fc.weight"]

    def test_a_module_in_two_places(self):
        shared = nn.Linear(4, 4)
        model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(4, 4)})
        assert [weight.name for weight in maskable_weights(model, ["b"])] == ["c.weight"]


class TestInclude:
    def model(self):
        attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
        norms = nn.Sequential(nn.LayerNorm((3, 8)), nn.RMSNorm((3, 8)), nn.BatchNorm1d(8))
        model = nn.ModuleDict({"attn": attention, "norms": norms, "emb": nn.Embedding(5, 8)})
        model["rnn"] = nn.LSTM(8, 6, num_layers=2, proj_size=3)
        model["pair"] = nn.Bilinear(3, 4, 5)
        model["conv1d"] = Conv1D(4, 8)
        model.register_parameter("token", nn.Parameter(torch.zeros(1, 1, 8)))
        model.register_parameter("positions", nn.Parameter(torch.zeros(1, 3, 8)))
        return model

    @pytest.mark.parametrize(
        ("include", "added"),
        [
            (["attn.in_proj_weight"], ["attn.in_proj_weight"]),
            (["attn"], ["attn.in_proj_weight"]),
            (("*.in_proj_weight", "emb"), ["attn.in_proj_weight", "emb.weight"]),
            (["rnn.weight_hh_*"], ["rnn.weight_hh_l0", "rnn.weight_hh_l1"]),
            (["rnn"], [f"rnn.weight_{kind}_l{n}" for n in range(2) for kind in ("ih", "hh", "hr")]),
            (["pair", "conv1d"], ["pair.weight", "conv1d.weight"]),
            (["positions"], ["positions"]),
        ],
    )
    def test_it_adds(self, include, added):
        names = [weight.name for weight in maskable_weights(self.model(), include=include)]
        assert sorted(names) == sorted(["attn.out_proj.weight", *added])

    def test_all_that_can_be_masked(self):
        names = [weight.name for weight in maskable_weights(self.model(), include=["*"])]
        assert "positions" in names
        assert len(names) == 1 + 1 + 1 + 6 + 1 + 1 + 1
        assert not [name for name in names if "norms" in name or "bias" in name or name == "token"]

    @pytest.mark.parametrize(
        "name", ["attn.in_proj_bias", "attn.bias_k", "norms.*", "norms.0.weight", "token", "rnn.bias*", "rn"]
    )
    def test_what_is_never_masked_matches_nothing(self, name):
        with pytest.raises(ValueError, match=rf"include has '{re.escape(name)}', which matches no maskable"):
            maskable_weights(self.model(), include=["emb", name])

    def test_a_usual_layer_may_be_named(self):
        assert [w.name for w in maskable_weights(make_model(), include=["fc"])] == NAMES

    def test_exclude_comes_first(self):
        left = maskable_weights(self.model(), exclude=["rnn.weight_hr*", "attn.*"], include=["rnn"])
        assert [weight.name for weight in left] == [
            f"rnn.weight_{kind}_l{n}" for n in range(2) for kind in ("ih", "hh")
        ]

    def test_what_include_adds_may_be_excluded_without_it(self):
        assert [w.name for w in maskable_weights(self.model(), ["emb"])] == ["attn.out_proj.weight"]

    @pytest.mark.parametrize("argument", ["exclude", "include"])
    def test_one_string_or_no_strings(self, argument):
        with pytest.raises(TypeError, match=rf"{argument} must be .*: use {argument}=\('emb',\)"):
            maskable_weights(self.model(), **{argument: "emb"})
        model = self.model()
        with pytest.raises(TypeError, match=f"{argument} has a Embedding, it must hold names"):
            maskable_weights(model, **{argument: [model["emb"]]})

    def test_computed_weights_are_not_among_them(self):
        model = nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5),
            prune.l1_unstructured(nn.Embedding(4, 4), "weight", 0.5),
            nn.Linear(4, 2),
        )
        with pytest.warns(UserWarning, match="is left out"):
            assert [weight.name for weight in maskable_weights(model, include=["*"])] == ["3.weight"]

    def test_an_excluded_layer_that_computes_its_weight_is_not_named(self):
        model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert [weight.name for weight in maskable_weights(model, ["0"])] == ["1.weight"]


class TestNeurons:
    @pytest.mark.parametrize(
        ("layer", "attribute", "count"),
        [
            (nn.MultiheadAttention(8, 2), "in_proj_weight", 24),
            (nn.Embedding(5, 8), "weight", 5),
            (nn.LSTM(8, 6), "weight_ih_l0", 24),
            (nn.Bilinear(3, 4, 5), "weight", 5),
            (Conv1D(4, 8), "weight", 4),
            (type("Conv1D", (Conv1D,), {"__module__": "of_a_user"})(4, 8), "weight", 4),
        ],
        ids=str,
    )
    def test_how_many(self, layer, attribute, count):
        mask = torch.ones(getattr(layer, attribute).shape, dtype=torch.bool)
        counted = fan_in(mask, neurons_of(layer))
        assert counted.tolist() == [mask.numel() // count] * count

    def test_another_conv1d_is_none_of_hugging_face(self):
        other = type("Conv1D", (nn.Module,), {"__module__": "of_a_user"})
        assert neurons_of(other()) == Neurons(dim=0)
        assert neurons_of(Conv1D(4, 8)) == Neurons(dim=1)

    def test_the_real_conv1d(self):
        layer = pytest.importorskip("transformers.pytorch_utils").Conv1D(4, 8)
        assert neurons_of(layer) == Neurons(dim=1)
        assert tuple(layer.weight.shape) == (8, 4)
