"""Uniform, ER and ERK densities: known answers, the total, and bad input."""

import math
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from resnet50 import resnet50_shapes
from torch import nn

from sparseopt_kernels.topology.densities import layer_densities
from sparseopt_kernels.topology.sparsify import sparsify


def nnz(shapes, densities):
    return sum(round(densities[name] * math.prod(shape)) for name, shape in shapes.items())


# jaxpruner's unit tests, its layout (*kernel, in, out) turned into PyTorch's.
SMALL = {"a": (4, 2), "b": (6, 3), "c": (6, 4, 2)}


@pytest.mark.parametrize(
    ("distribution", "sparsities"),
    [("erk", (0.0, 0.31, 0.655)), ("er", (0.21, 0.47, 0.56)), ("uniform", (0.5, 0.5, 0.5))],
)
def test_small_known_answers(distribution, sparsities):
    densities = layer_densities(SMALL, 0.5, distribution)
    assert list(densities) == ["a", "b", "c"]
    assert [1 - density for density in densities.values()] == pytest.approx(sparsities, abs=0.005)


def test_resnet50_erk_known_answers():
    shapes = resnet50_shapes()
    assert len(shapes) == 54
    assert sum(math.prod(shape) for shape in shapes.values()) == 25502912
    densities = layer_densities(shapes, 0.9)
    assert [name for name, density in densities.items() if density == 1.0] == ["layer1.0.conv1"]
    by_shape = {
        (64, 3, 7, 7): 0.42,
        (64, 64, 3, 3): 0.1773,
        (256, 64, 1, 1): 0.9588,
        (128, 256, 1, 1): 0.5747,
        (128, 128, 3, 3): 0.0867,
        (512, 128, 1, 1): 0.4779,
        (256, 256, 3, 3): 0.0428,
        (1024, 256, 1, 1): 0.2386,
        (512, 512, 3, 3): 0.0213,
        (2048, 512, 1, 1): 0.1192,
        (2048, 1024, 1, 1): 0.0715,
        (1000, 2048): 0.0726,
    }
    seen = {shape: densities[name] for name, shape in shapes.items() if shape in by_shape}
    assert seen == pytest.approx(by_shape, abs=5e-5)
    eps = densities["fc"] * 1000 * 2048 / (1000 + 2048)
    assert eps == pytest.approx(48.786097, abs=1e-6)
    assert abs(nnz(shapes, densities) - 2550291) <= 64
    assert abs(nnz(shapes, densities) - 0.1 * 25502912) <= len(shapes)


@pytest.mark.parametrize("distribution", ["uniform", "er", "erk"])
def test_a_single_layer_keeps_the_target(distribution):
    assert layer_densities({"fc": (30, 20)}, 0.9, distribution) == {"fc": pytest.approx(0.1)}


def test_layers_are_made_dense_in_several_rounds():
    # 88.385 weights. eps = 88.385 / 89 = 0.993 puts a (2 eps of 1) and b (3 eps of 2) over 1, but not c
    # (4 eps of 4); without a and b it is 85.385 / 84 = 1.017, and c is over 1 too.
    shapes = {"a": (1, 1), "b": (2, 1), "c": (2, 2), "d": (40, 40)}
    densities = layer_densities(shapes, 0.945, "erk")
    assert densities == {"a": 1.0, "b": 1.0, "c": 1.0, "d": pytest.approx((88.385 - 7) / 1600)}


shape_lists = st.lists(
    st.lists(st.integers(1, 40), min_size=2, max_size=4).map(tuple), min_size=1, max_size=8
)


@settings(max_examples=100, deadline=None)
@given(
    shapes=shape_lists, sparsity=st.floats(0, 0.999), distribution=st.sampled_from(["er", "erk", "uniform"])
)
def test_total_is_within_one_weight_per_layer(shapes, sparsity, distribution):
    named = {f"layer{i}": shape for i, shape in enumerate(shapes)}
    densities = layer_densities(named, sparsity, distribution)
    assert all(0.0 < density <= 1.0 for density in densities.values())
    total = sum(math.prod(shape) for shape in shapes)
    assert abs(nnz(named, densities) - (1 - sparsity) * total) <= len(shapes)


@settings(max_examples=50, deadline=None)
@given(shapes=shape_lists, sparsity=st.floats(0.01, 0.999))
def test_layers_that_are_not_dense_share_one_eps(shapes, sparsity):
    named = {f"layer{i}": shape for i, shape in enumerate(shapes)}
    densities = layer_densities(named, sparsity, "erk")
    ratio = {name: densities[name] * math.prod(shape) / sum(shape) for name, shape in named.items()}
    # One weight is the least that a layer gets.
    least = {name for name, shape in named.items() if round(densities[name] * math.prod(shape)) <= 1}
    open_layers = [ratio[name] for name in named if densities[name] < 1.0 - 1e-9 and name not in least]
    if open_layers:
        assert open_layers == pytest.approx([open_layers[0]] * len(open_layers))
        # No layer was made dense that had room below it.
        assert all(ratio[name] <= open_layers[0] * (1 + 1e-9) for name in named if name not in least)


def test_er_ignores_the_kernel_and_erk_does_not():
    shapes = {"conv": (64, 64, 3, 3), "fc": (64, 64)}
    er = layer_densities(shapes, 0.9, "er")
    assert er["conv"] == pytest.approx(er["fc"])
    erk = layer_densities(shapes, 0.9, "erk")
    assert erk["fc"] > 5 * erk["conv"]


@pytest.mark.parametrize("distribution", ["uniform", "er", "erk"])
@pytest.mark.parametrize("sparsity", [0.9, 0.995, 0.999999])
def test_a_layer_has_at_least_one_weight(distribution, sparsity):
    shapes = {"body": (300, 200), "head": (1, 64), "one": (1, 1), "two": (2, 1), "conv": (3, 1, 3, 3)}
    for name, density in layer_densities(shapes, sparsity, distribution).items():
        assert round(density * math.prod(shapes[name])) >= 1
    model = nn.ModuleDict({"body": nn.Linear(200, 300), "head": nn.Linear(64, 1), "conv": nn.Conv2d(1, 3, 3)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        masks = sparsify(model, sparsity, distribution)
    densities = layer_densities(model, sparsity, distribution)
    for name, parameter in masks.named().items():
        assert int(masks[parameter].sum()) == round(densities[name] * parameter.numel()) >= 1


def test_one_weight_is_the_least_exactly():
    assert round(0.25 * 2) == 0  # half a weight
    assert layer_densities({"a": (1, 2)}, 0.75, "uniform") == {"a": 0.5}
    assert layer_densities({"a": (1, 5), "b": (100, 100)}, 0.9, "uniform") == {
        "a": 0.2,
        "b": pytest.approx(0.1),
    }
    assert layer_densities({"a": (1, 6)}, 0.9, "uniform") == {"a": pytest.approx(0.1)}
    assert layer_densities({"a": (1, 5), "b": (4, 4)}, {"a": 0.99}) == {"a": 0.2}


def test_zero_sparsity_is_exactly_dense():
    assert set(layer_densities(resnet50_shapes(), 0.0).values()) == {1.0}


@pytest.mark.parametrize("distribution", ["uniform", "er", "erk"])
def test_a_layer_without_elements_changes_nothing(distribution):
    shapes = {"a": (40, 30), "b": (50, 10, 3, 3)}
    densities = layer_densities({"empty": (0, 30), **shapes}, 0.9, distribution)
    assert densities.pop("empty") == pytest.approx(0.1)
    assert densities == layer_densities(shapes, 0.9, distribution)
    assert layer_densities({"empty": (0, 30)}, 0.9, distribution) == {"empty": pytest.approx(0.1)}


class TestModel:
    def model(self):
        return nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ConvTranspose2d(16, 8, 3), nn.Linear(8, 40)
        )

    def test_a_model_counts_its_maskable_weights(self):
        shapes = {"0.weight": (16, 3, 3, 3), "2.weight": (16, 8, 3, 3), "3.weight": (40, 8)}
        assert layer_densities(self.model(), 0.8) == layer_densities(shapes, 0.8)


class TestBadInput:
    @pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, math.nan, math.inf])
    def test_sparsity(self, sparsity):
        with pytest.raises(ValueError, match=rf"sparsity is {sparsity}, it must be in \[0, 1\)"):
            layer_densities(SMALL, sparsity)

    def test_distribution(self):
        with pytest.raises(ValueError, match=r"distribution is 'ERK', it must be one of .*'erk'"):
            layer_densities(SMALL, 0.5, "ERK")  # type: ignore[arg-type]

    @pytest.mark.parametrize("nothing", [{}, nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())])
    def test_nothing_to_mask(self, nothing):
        with pytest.raises(ValueError, match="nothing to mask"):
            layer_densities(nothing, 0.5)

    @pytest.mark.parametrize("shape", [(), (3,), (3, -1)])
    def test_shape(self, shape):
        with pytest.raises(ValueError, match=r"shape of 'a' is .*, it must be \(out, in, \*kernel\)"):
            layer_densities({"a": shape}, 0.5)
