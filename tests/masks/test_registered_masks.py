"""Buffers that are masks and buffers that are not, what is remembered of them, and what must not break."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from side_by_side import same_bits
from torch import nn

from sparseopt_kernels.finished.finalize import finalize
from sparseopt_kernels.masks.mapping import Masks, neurons_in
from sparseopt_kernels.masks.registered_masks import remembered_mask
from sparseopt_kernels.neurons import Neurons
from sparseopt_kernels.optimizer import SparseOpt
from sparseopt_kernels.topology.set import SET
from sparseopt_kernels.topology.sparsify import sparsify


class Attention(nn.Module):
    """A parameter and a buffer of the user's own, whose names are those of a parameter and its mask."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.attn = nn.Parameter(torch.randn(8, 8))
        self.register_buffer("attn_mask", mask)


@pytest.mark.parametrize(
    "mask",
    [
        torch.full((8, 8), -torch.inf).triu(1),
        torch.ones(8, 8),
        torch.ones(8, dtype=torch.bool),
        torch.zeros(8, 8, dtype=torch.int64),
    ],
    ids=["float", "ones", "another-shape", "integer"],
)
def test_a_users_buffer_beside_a_users_parameter_is_left_alone(mask: torch.Tensor) -> None:
    model = Attention(mask.clone())
    before = model.attn.detach().clone()
    with pytest.warns(UserWarning, match="'attn'"):  # it stays dense
        masks = sparsify(model, 0.5)
    assert list(masks.named()) == ["layer.weight"]
    finalize(model)
    assert same_bits(model.attn, before)
    assert torch.equal(model.state_dict()["attn_mask"], mask)


def test_an_error_names_the_buffer() -> None:
    layer = nn.Linear(6, 4)
    layer.register_buffer("weight_mask", torch.ones(6, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"'0\.weight' has shape .* \(it is the buffer '0\.weight_mask'\)"):
        Masks(nn.Sequential(layer))


def test_a_mask_whose_memory_was_freed() -> None:
    layer: Any = nn.Linear(6, 4)
    layer.register_buffer("weight_mask", torch.ones(4, 6, dtype=torch.bool))
    optimizer = SparseOpt(layer.parameters(), masks=Masks(layer))
    layer(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    layer.weight_mask.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"'weight' has no memory"):
        optimizer.step()


@pytest.mark.parametrize("model", [[nn.Linear(2, 2)], {}, None], ids=["list", "state_dict", "none"])
def test_no_module(model: Any) -> None:
    with pytest.raises(TypeError, match=r"model is a \w+, it must be a torch\.nn\.Module"):
        Masks(model)
    with pytest.raises(TypeError, match=r"model is a \w+, it must be a torch\.nn\.Module"):
        sparsify(model, 0.5)


def test_parameters_can_be_swapped() -> None:
    """A weak reference to a parameter would make ``swap_tensors`` raise."""
    layer: Any = nn.Linear(20, 30)
    masks = sparsify(layer, 0.5)
    optimizer = SparseOpt(layer.parameters(), masks=masks)
    layer(torch.ones(2, 20)).sum().backward()
    optimizer.step()
    torch.utils.swap_tensors(layer.weight, nn.Parameter(torch.ones(30, 20)))
    assert remembered_mask(layer.weight) is not None


def test_what_is_remembered_ends_with_the_layer() -> None:
    layer = nn.Linear(20, 30)
    sparsify(layer, 0.5)
    alive, weight = weakref.ref(layer), layer.weight
    del layer
    gc.collect()
    assert alive() is None
    assert remembered_mask(weight) is None


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"]
)
def test_a_copy_of_a_dict_of_registered_masks_keeps_its_neurons(duplicate: Callable[[Any], Any]) -> None:
    layer: Any = nn.ConvTranspose2d(6, 4, 3, groups=2)
    masks = dict(sparsify(layer, 0.6, "uniform"))
    optimizer = SparseOpt([layer.weight], lr=0.1, masks=masks)
    dst = SET(masks, update_every=2, stop_at=9, min_fan_in=1)
    twin, twin_optimizer, twin_dst = duplicate((layer, optimizer, dst))
    (twin_masks,) = {id(m): m for m in (twin_optimizer._masks, twin_dst.masks)}.values()
    assert neurons_in(twin_masks, twin.weight) == Neurons(dim=1, groups=2)
    for own, each in ((layer, optimizer), (twin, twin_optimizer)):
        own.weight.grad = torch.randn(6, 2, 3, 3, generator=torch.Generator().manual_seed(0))
        each.step()
    assert same_bits(layer.weight, twin.weight)
    for each_dst in (dst, twin_dst):
        each_dst.step()
        each_dst.step()
    assert torch.equal(layer.weight_mask, twin.weight_mask)


def test_a_weight_that_its_layer_computes_cannot_be_finalized() -> None:
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 4))
    sparsify(model, 0.5)
    nn.utils.parametrizations.weight_norm(model[0])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"'0\.weight' has a mask, but its layer computes it: remove"):
        finalize(model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
