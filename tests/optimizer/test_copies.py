"""Copies of model, masks and optimizer, together and alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import Backend
from network import Network, assert_same, assert_same_state, each_mapping, run
from side_by_side import same_bits

from sparseopt_kernels.masks.mapping import Masks
from sparseopt_kernels.optimizer import SparseOpt


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@each_mapping
def test_copies_of_model_masks_and_optimizer_together(backend: Backend, mapping: str, how: str) -> None:
    """The copy goes on as the original does, with masks of its own."""
    model = Network()
    masks = model.masks(mapping)
    optimizer = SparseOpt(
        model.parameters(), lr=0.1, momentum=0.9, max_grad_norm=0.5, masks=masks, backend=backend.name
    )
    run(model, optimizer, range(3))
    bundle = (model, masks, optimizer)
    twin = copy.deepcopy(bundle) if how == "deepcopy" else pickle.loads(pickle.dumps(bundle))
    other, other_masks, other_optimizer = twin
    assert other_optimizer.param_groups[0]["params"][0] is other[0].weight
    assert other_optimizer._step_supports_amp_scaling
    if mapping != "no-mask":
        assert other_masks[other[0].weight] is other[0].weight_mask
        assert other_masks[other[0].weight] is not masks[model[0].weight]
        # A mask of the copy is changed: only the copy sees it.
        other[0].weight_mask[2] = False
        run(other, other_optimizer, range(3, 4))
        assert not other[0].weight[2].any()
        assert model[0].weight[2].any()
        model[0].weight_mask[2] = False
        run(model, optimizer, range(3, 4))
        run(model, optimizer, range(4, 8))
        run(other, other_optimizer, range(4, 8))
    else:
        run(model, optimizer, range(3, 8))
        run(other, other_optimizer, range(3, 8))
    assert_same(model, other)
    assert_same_state(optimizer, other_optimizer)


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
def test_copy_of_the_optimizer_alone(backend: Backend, how: Callable[[Any], Any]) -> None:
    """Its parameters and masks are copied with it, before and after its first step."""
    model = Network()
    optimizer = SparseOpt(
        model.parameters(), lr=0.1, momentum=0.9, masks=model.masks_dict(), backend=backend.name
    )
    for _ in range(2):
        twin = how(optimizer)
        grads = [torch.randn_like(p) for p in model.parameters()]
        for opt in (optimizer, twin):
            for p, grad in zip(opt.param_groups[0]["params"], grads, strict=True):
                p.grad = grad.clone()
            opt.step()
        for p, q in zip(optimizer.param_groups[0]["params"], twin.param_groups[0]["params"], strict=True):
            assert p is not q
            assert same_bits(p, q)
        assert_same_state(optimizer, twin)


def test_shallow_copy_keeps_the_parameters(backend: Backend) -> None:
    model = Network()
    optimizer = SparseOpt(model.parameters(), lr=0.1, masks=Masks(model), backend=backend.name)
    twin = copy.copy(optimizer)
    run(model, twin, range(2))
    other = Network()
    run(other, SparseOpt(other.parameters(), lr=0.1, masks=Masks(other), backend=backend.name), range(2))
    assert_same(model, other)
