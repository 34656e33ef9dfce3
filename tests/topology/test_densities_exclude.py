"""``layer_densities`` without the layers that stay dense: the budget is that of the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from sparseopt_kernels.topology.densities import Distribution, layer_densities
from sparseopt_kernels.topology.sparsify import sparsify


def make_model() -> nn.ModuleDict:
    body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 12, 3, groups=2))
    return nn.ModuleDict(
        {"body": body, "up": nn.ConvTranspose2d(12, 6, 3, groups=3), "fc": nn.Linear(20, 10)}
    )


SHAPES = {
    "body.0.weight": (16, 3, 3, 3),
    "body.2.weight": (12, 8, 3, 3),
    "up.weight": (12, 2, 3, 3),
    "fc.weight": (10, 20),
}


@pytest.mark.parametrize("distribution", ["uniform", "er", "erk"])
@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        (("fc",), ["body.0.weight", "body.2.weight", "up.weight"]),
        (["body.*"], ["up.weight", "fc.weight"]),
        (["*.0", "fc.weight"], ["body.2.weight", "up.weight"]),
        ((), list(SHAPES)),
    ],
    ids=str,
)
def test_a_model(distribution: Distribution, exclude: Sequence[str], left: list[str]) -> None:
    densities = layer_densities(make_model(), 0.8, distribution, exclude=exclude)
    assert densities == layer_densities({name: SHAPES[name] for name in left}, 0.8, distribution)
    assert list(densities) == left


@pytest.mark.parametrize("distribution", ["uniform", "er", "erk"])
def test_it_tells_what_sparsify_does(distribution: Distribution) -> None:
    model = make_model()
    densities = layer_densities(model, 0.8, distribution, exclude=["up", "body.0"])
    masks = sparsify(model, 0.8, distribution, exclude=["up", "body.0"])
    active = {name: int(masks[parameter].sum()) for name, parameter in masks.named().items()}
    assert active == {name: round(densities[name] * torch.Size(SHAPES[name]).numel()) for name in densities}


def test_of_shapes_the_names_are_those_given() -> None:
    assert list(layer_densities(SHAPES, 0.8, exclude=["body.*"])) == ["up.weight", "fc.weight"]
    rest = {name: SHAPES[name] for name in ("body.0.weight", "up.weight", "fc.weight")}
    assert layer_densities(SHAPES, 0.8, exclude=["body.2.weight"]) == layer_densities(rest, 0.8)


def test_the_shape_of_an_excluded_layer_does_not_matter() -> None:
    assert layer_densities({"scale": (3,), "fc": (5, 4)}, 0.5, exclude=["scale"]) == {"fc": 0.5}


@pytest.mark.parametrize("network", [make_model(), SHAPES], ids=["model", "shapes"])
class TestBadInput:
    def test_a_pattern_without_a_match(self, network: Any) -> None:
        with pytest.raises(ValueError, match=r"exclude has 'body\.1', which matches no maskable weight"):
            layer_densities(network, 0.5, exclude=["up*", "body.1"])

    def test_one_string(self, network: Any) -> None:
        with pytest.raises(TypeError, match=r"exclude must be .*, not one string: use exclude=\('fc',\)"):
            layer_densities(network, 0.5, exclude="fc")

    def test_nothing_left(self, network: Any) -> None:
        with pytest.raises(ValueError, match="nothing to mask: no Linear, Conv or ConvTranspose weight is"):
            layer_densities(network, 0.5, exclude=["*"])


@pytest.mark.parametrize("function", [layer_densities, sparsify])
def test_a_warning_points_at_the_caller(function: Callable[[nn.Module, float], object]) -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match="layer '0' is left out") as caught:
        function(model, 0.5)
    assert [warning.filename for warning in caught] == [__file__]
