"""Masks that are refused, at construction or by ``sparsify``."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from refusals import BAD_MASKS, each_bad_mask, mask_like, weights, words
from side_by_side import same_bits
from torch import nn

from sparseopt_kernels.masks.mapping import Masks
from sparseopt_kernels.optimizer import SparseOpt
from sparseopt_kernels.topology.sparsify import sparsify


@each_bad_mask
def test_masks_at_construction(bad: str) -> None:
    """The message calls the parameter by the name it was given, or by its place."""
    make, message = BAD_MASKS[bad]
    a, b, _ = weights()
    masks = {a: mask_like(a), b: make(b)}
    with pytest.raises(ValueError, match=words("mask for", "param_groups[0]['params'][1]", *message)):
        SparseOpt([a, b], masks=masks)
    with pytest.raises(ValueError, match=words("mask for", "'second'", *message)):
        SparseOpt([("first", a), ("second", b)], masks=masks)


@pytest.mark.parametrize("bad", ["shape", "float"])
def test_mask_buffers_of_a_model(bad: str) -> None:
    make, message = BAD_MASKS[bad]
    layer = nn.Linear(9, 4)
    layer.register_buffer("weight_mask", make(layer.weight))
    model = nn.Sequential(nn.Linear(2, 2), layer)
    with pytest.raises(ValueError, match=words("'1.weight'", *message)):
        Masks(model)


def test_mask_for_a_parameter_the_optimizer_does_not_have() -> None:
    a, b, _ = weights()
    with pytest.raises(ValueError, match=words("mask for", "(4, 9)", "not among the optimizer's parameters")):
        SparseOpt([a], masks={a: mask_like(a), b: mask_like(b)})


def test_masks_by_name_instead_of_by_parameter() -> None:
    (a,) = weights(1)
    with pytest.raises(ValueError, match=words("masks has the key 'weight'", "keys must be parameters")):
        SparseOpt([("weight", a)], masks={"weight": mask_like(a)})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    "masks", [[torch.ones(4, 9)], torch.ones(4, 9), lambda p: p], ids=["list", "tensor", "function"]
)
def test_masks_that_are_no_mapping(masks: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=words("masks", "mapping")):
        SparseOpt(weights(1), masks=masks)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_sparsity_outside_its_range(sparsity: float) -> None:
    model = nn.Linear(9, 4)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=words("sparsity", str(sparsity))):
        sparsify(model, sparsity)
    assert model.state_dict().keys() == before.keys()
    assert same_bits(model.weight, before["weight"])


def test_a_model_with_nothing_to_mask() -> None:
    with pytest.raises(ValueError, match=r"mask"):
        sparsify(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()), 0.5)
    with pytest.raises(ValueError, match=words("no mask", "sparsify")):
        Masks(nn.Linear(3, 3))
