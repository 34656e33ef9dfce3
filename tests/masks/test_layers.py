"""Which weights can be masked, and where their neurons lie."""

import pytest
import torch
from masked_model import NAMES, make_model
from torch import nn

from sparseopt_kernels.layers import maskable_weights, neurons_of
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
