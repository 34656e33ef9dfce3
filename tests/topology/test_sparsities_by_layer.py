"""``sparsity`` as a mapping from layers to sparsities, in ``sparsify`` and ``layer_densities`` alike."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from masked_model import NAMES, assert_same, make_model, masks_of
from torch import nn

from sparseopt_kernels.masks.mapping import Masks
from sparseopt_kernels.topology.densities import layer_densities
from sparseopt_kernels.topology.sparsify import sparsify

SHAPES = {weight: tuple(make_model().get_parameter(weight).shape) for weight in NAMES}


@pytest.mark.parametrize(
    ("sparsity", "expected"),
    [
        ({"fc": 0.5}, {"fc.weight": 0.5}),
        ({"fc.weight": 0.5}, {"fc.weight": 0.5}),
        ({"body.*": 0.75}, {"body.0.weight": 0.25, "body.3.weight": 0.25}),
        ({"body.0": 0.5, "body.*": 0.75}, {"body.0.weight": 0.5, "body.3.weight": 0.25}),
        (
            {"fc": 0.75, "up": 0.0, "*": 0.5},
            {"body.0.weight": 0.5, "body.3.weight": 0.5, "up.weight": 1.0, "fc.weight": 0.25},
        ),
    ],
    ids=str,
)
def test_the_first_match_wins_and_the_rest_stays_dense(
    sparsity: dict[str, float], expected: dict[str, float]
) -> None:
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    assert layer_densities(model, sparsity) == expected
    masks = sparsify(model, sparsity)
    assert {name: int(masks[p].sum()) for name, p in masks.named().items()} == {
        name: round(density * math.prod(SHAPES[name])) for name, density in expected.items()
    }
    for name, value in before.items():
        if name not in expected:
            assert torch.equal(model.state_dict()[name], value), name


def test_of_shapes_the_names_are_those_given() -> None:
    assert layer_densities(SHAPES, {"fc.*": 0.5, "body.?.weight": 0.75}) == {
        "body.0.weight": 0.25,
        "body.3.weight": 0.25,
        "fc.weight": 0.5,
    }


def test_it_goes_with_include_and_exclude() -> None:
    model = nn.ModuleDict({"emb": nn.Embedding(10, 8), "a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    densities = layer_densities(model, {"emb": 0.75, "*": 0.5}, exclude=["b"], include=["emb"])
    assert densities == {"emb.weight": 0.25, "a.weight": 0.5}


def test_every_name_of_a_shared_weight_counts() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    assert layer_densities(model, {"b": 0.5}) == {"a.weight": 0.5}


def test_a_new_head_beside_masked_layers() -> None:
    model = make_model()
    sparsify(model, 0.6, exclude=["fc"], seed=5)
    before = {name: mask.clone() for name, mask in masks_of(model).items()}
    model["fc"] = nn.Linear(20, 7)
    masks = sparsify(model, {"fc": 0.5})
    assert list(masks.named()) == NAMES
    assert masks[model["fc"].weight].sum() == 70
    assert_same({name: mask for name, mask in masks_of(model).items() if not name.startswith("fc")}, before)
    assert list(Masks(model)) == list(masks)


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "no match": ({"fc": 0.5, "body.1": 0.5}, ValueError, r"sparsity has 'body\.1', which matches no"),
    "an unusual layer": ({"fc": 0.5, "body.1": 0.5}, ValueError, r"need include"),
    "one": ({"fc": 0.5, "up": 1.0}, ValueError, r"sparsity of 'up' is 1\.0, it must be in \[0, 1\)"),
    "negative": ({"body.*": -0.5}, ValueError, r"sparsity of 'body\.\*' is -0\.5, it must be in \[0, 1\)"),
    "nan": ({"up": math.nan}, ValueError, "sparsity of 'up' is nan"),
    "no number": ({"up": "0.5"}, TypeError, "sparsity of 'up' is a str, it must be a number in"),
    "no name": ({torch.zeros(3): 0.5}, TypeError, "sparsity has a Tensor, it must hold names"),
    "empty": ({}, ValueError, "sparsity is an empty mapping"),
    "in vain": ({"*": 0.5, "fc": 0.9}, ValueError, "sparsity has 'fc', but patterns before it match all"),
    "a word": ("0.5", TypeError, "sparsity is a str, it must be a number"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("function", [sparsify, layer_densities])
def test_bad_mappings(bad: str, function: Any) -> None:
    sparsity, error, message = BAD[bad]
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        function(model, sparsity)
    assert_same(model.state_dict(), before)


@pytest.mark.parametrize("function", [sparsify, layer_densities])
def test_a_distribution_shares_one_sparsity(function: Any) -> None:
    for distribution in ("erk", "uniform"):
        with pytest.raises(ValueError, match=f"distribution is '{distribution}', but sparsity is a mapping"):
            function(make_model(), {"fc": 0.5}, distribution)


def test_what_is_excluded_does_not_match() -> None:
    with pytest.raises(
        ValueError, match="sparsity has 'fc', which matches no maskable weight that is not excl"
    ):
        sparsify(make_model(), {"fc": 0.5, "up": 0.5}, exclude=["fc"])
