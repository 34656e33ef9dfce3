"""Masks that move: the next step zeroes what lies outside them, whoever wrote it."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch
from backends import Backend
from numpy.typing import NDArray
from side_by_side import same_bits
from torch import Tensor, nn
from torch.nn.parameter import Parameter
from watched import MaskedLinear, give_gradient, masked_layer, random_mask, settled

from sparseopt_kernels.masks.mapping import Masks
from sparseopt_kernels.optimizer import SparseOpt


def assert_masked(layer: MaskedLinear, optimizer: SparseOpt) -> None:
    buffer = optimizer.state[layer.weight].get("momentum_buffer")
    for tensor in (layer.weight,) if buffer is None else (layer.weight, buffer):
        assert not tensor[~layer.weight_mask].any()
        assert tensor[layer.weight_mask].any()


@torch.no_grad()
def _overwrite(layer: MaskedLinear, optimizer: SparseOpt, how: str) -> None:
    weight, mask = layer.weight, layer.weight_mask
    other = masked_layer(seed=7)
    buffer = optimizer.state[weight]["momentum_buffer"]
    if how == "weights-init":
        nn.init.ones_(weight)
    elif how == "one-weight":
        at = (~mask).nonzero()[-1]
        weight[tuple(at)] = 1.0
    elif how == "weights-load_state_dict":
        layer.load_state_dict({"weight": torch.ones_like(weight), "weight_mask": mask.clone()})
    elif how == "weights-data-replaced":
        weight.data = torch.ones_like(weight)
    elif how == "buffer-in-place":
        buffer.fill_(1.0)
    elif how == "buffer-replaced":
        optimizer.state[weight]["momentum_buffer"] = torch.ones_like(weight)
    elif how == "optimizer-load_state_dict":
        state = copy.deepcopy(optimizer.state_dict())
        state["state"][0]["momentum_buffer"].fill_(1.0)
        optimizer.load_state_dict(state)
    elif how == "mask-in-place":
        mask.copy_(other.weight_mask)
    elif how == "mask-one-bit":
        mask[tuple(mask.nonzero()[0])] = False
    elif how == "mask-logical":
        mask.logical_and_(other.weight_mask).logical_or_(random_mask((23, 517), 8, "sparse99"))
    elif how == "mask-through-a-view":
        mask.view(-1)[: 23 * 200].logical_not_()
    elif how == "mask-data-replaced":
        mask.data = other.weight_mask
    elif how == "mask-replaced":
        layer.weight_mask = other.weight_mask
    elif how == "mask-load_state_dict":
        layer.load_state_dict(other.state_dict())
    elif how == "mask-registered-anew":
        del layer.weight_mask
        layer.register_buffer("weight_mask", other.weight_mask)


@pytest.mark.parametrize(
    "how",
    [
        "weights-init",
        "one-weight",
        "weights-load_state_dict",
        "weights-data-replaced",
        "buffer-in-place",
        "buffer-replaced",
        "optimizer-load_state_dict",
        "mask-in-place",
        "mask-one-bit",
        "mask-logical",
        "mask-through-a-view",
        "mask-data-replaced",
        "mask-replaced",
        "mask-load_state_dict",
        "mask-registered-anew",
    ],
)
def test_next_step_zeroes_what_lies_outside_the_mask(backend: Backend, how: str) -> None:
    """Whatever was changed, by whatever means, and however much a backend skips otherwise; and the active
    weights go on from what is there, as those of an optimizer that was just made."""
    layer, optimizer = settled(backend)
    _overwrite(layer, optimizer, how)
    give_gradient(layer, 50)
    fresh_layer = copy.deepcopy(layer)
    give_gradient(fresh_layer, 50)
    fresh = SparseOpt(
        fresh_layer.parameters(), lr=0.1, momentum=0.9, masks=Masks(fresh_layer), backend=backend.name
    )
    fresh.state[fresh_layer.weight]["momentum_buffer"] = optimizer.state[layer.weight][
        "momentum_buffer"
    ].clone()
    optimizer.step()
    fresh.step()
    assert_masked(layer, optimizer)
    assert same_bits(layer.weight, fresh_layer.weight)
    for step in range(3):
        give_gradient(layer, 60 + step)
        optimizer.step()
        assert_masked(layer, optimizer)


def test_a_plain_dict_of_masks_is_looked_at_each_step(backend: Backend) -> None:
    """Entries of the dict replaced, removed and added while training."""
    layers = [masked_layer(0), masked_layer(1)]
    a, b = (layer.weight for layer in layers)
    masks = {a: layers[0].weight_mask}
    optimizer = SparseOpt([a, b], lr=0.1, momentum=0.9, masks=masks, backend=backend.name)

    def step(seed: int) -> None:
        for layer in layers:
            give_gradient(layer, seed)
        optimizer.step()

    step(0)
    assert not a[~masks[a]].any()
    assert b.all()
    masks[a] = random_mask((23, 517), 5, "sparse99")
    step(1)
    assert not a[~masks[a]].any()
    masks[b] = random_mask((23, 517), 6)
    step(2)
    assert not b[~masks[b]].any()
    del masks[a]
    step(3)
    assert a.all()
    masks[a] = masks.pop(b)  # as many as before, of another parameter
    step(4)
    assert not a[~masks[a]].any()
    assert b.all()
    del masks[a]
    step(5)
    assert a.all()


def test_a_mask_shared_by_two_parameters(backend: Backend) -> None:
    layers = [masked_layer(0), masked_layer(1)]
    mask = layers[0].weight_mask
    masks = {layer.weight: mask for layer in layers}
    optimizer = SparseOpt(list(masks), lr=0.1, momentum=0.9, masks=masks, backend=backend.name)
    for step in range(6):
        if step % 2:
            mask.copy_(random_mask((23, 517), step, "sparse99"))
        for layer in layers:
            give_gradient(layer, step)
        optimizer.step()
        for p in masks:
            assert not p[~mask].any()
            assert p[mask].all()


def test_mask_of_a_parameter_that_gets_its_gradient_later(backend: Backend) -> None:
    """What never had a gradient is left alone, as SGD would; its first step sees the mask of that step."""
    layers = [masked_layer(0), masked_layer(1)]
    masks = {layer.weight: layer.weight_mask for layer in layers}
    optimizer = SparseOpt(list(masks), lr=0.1, momentum=0.9, masks=masks, backend=backend.name)
    for step in range(4):
        give_gradient(layers[0], step)
        if step % 2:
            layers[1].weight_mask.copy_(random_mask((23, 517), step, "sparse99"))
        optimizer.step()
        assert layers[1].weight.all()
    give_gradient(layers[1], 9)
    optimizer.step()
    assert_masked(layers[1], optimizer)


def test_masks_that_change_while_a_momentum_waits_without_gradient(backend: Backend) -> None:
    """Pruned and grown again between two gradients: the weight and its momentum start at 0."""
    layer, optimizer = settled(backend)
    former = layer.weight_mask.clone()
    layer.weight.grad = None
    layer.weight_mask[:12] = False
    optimizer.step()
    layer.weight_mask.copy_(former)
    optimizer.step()
    assert not layer.weight[:12].any()
    assert not optimizer.state[layer.weight]["momentum_buffer"][:12].any()
    assert layer.weight[12:].any()
    give_gradient(layer, 10)
    assert layer.weight.grad is not None
    layer.weight.grad[:12] = 0.0
    optimizer.step()
    assert not layer.weight[:12].any()


def test_momentum_switched_off_and_on_again(backend: Backend) -> None:
    """The buffer waits, as with SGD; what masks have pruned meanwhile has no momentum when it is back."""
    layer, optimizer = settled(backend)
    group = optimizer.param_groups[0]
    waiting = optimizer.state[layer.weight]["momentum_buffer"].clone()
    group["momentum"] = 0.0
    give_gradient(layer, 10)
    optimizer.step()
    assert same_bits(optimizer.state[layer.weight]["momentum_buffer"], waiting)
    layer.weight_mask[:12] = False
    optimizer.step()
    assert not layer.weight[:12].any()
    group["momentum"] = 0.9
    optimizer.step()
    assert_masked(layer, optimizer)


def test_momentum_switched_on_mid_run_begins_with_a_first_step(backend: Backend) -> None:
    layer = masked_layer()
    optimizer = SparseOpt(layer.parameters(), lr=0.1, dampening=0.5, masks=Masks(layer), backend=backend.name)
    for step in range(3):
        give_gradient(layer, step)
        optimizer.step()
    assert not optimizer.state
    optimizer.param_groups[0].update(momentum=0.9, correction="none")
    optimizer.step()
    assert layer.weight.grad is not None
    expected = torch.where(layer.weight_mask, layer.weight.grad, 0.0)  # dampening waits for the second step
    assert torch.equal(optimizer.state[layer.weight]["momentum_buffer"], expected)


def test_two_optimizers_take_turns_on_one_model(backend: Backend) -> None:
    """Each sees that the other has written, and neither leaves anything outside the mask."""
    layer = masked_layer()
    masks = Masks(layer)
    optimizers = [
        SparseOpt(layer.parameters(), lr=lr, momentum=0.9, masks=masks, backend=backend.name)
        for lr in (0.1, 0.01)
    ]
    for step in range(8):
        if step % 3 == 2:
            layer.weight_mask.copy_(random_mask((23, 517), step, "sparse99"))
        give_gradient(layer, step)
        optimizers[step % 2].step()
        assert_masked(layer, optimizers[step % 2])


class MemoryGivenAgain:
    """Memory of one size: what was freed last is given first, as allocators do, but without fail."""

    def __init__(self) -> None:
        self.freed: list[NDArray[np.bool_]] = []
        self.given_again = 0

    def copy(self, mask: Tensor) -> Tensor:
        self.given_again += bool(self.freed)
        memory = self.freed.pop() if self.freed else np.empty(mask.shape, np.bool_)
        lent = memory.view()  # lives as long as the tensor's storage
        weakref.finalize(lent, self.freed.append, memory)
        lent[:] = mask.numpy()
        return torch.from_numpy(lent)


def test_a_mapping_that_makes_its_masks_anew(backend: Backend) -> None:
    """Its masks may lie where those of the step before lay, and were written as often."""
    p = Parameter(torch.ones(64, 64))
    p.grad = torch.zeros_like(p)
    scores = torch.rand(64, 64)
    memory = MemoryGivenAgain()

    class Computed(Mapping[Parameter, Tensor]):
        threshold = 0.1

        def __getitem__(self, parameter: Parameter) -> Tensor:
            if parameter is not p:
                raise KeyError(parameter)
            return memory.copy(scores > self.threshold)

        def __iter__(self) -> Iterator[Parameter]:
            return iter([p])

        def __len__(self) -> int:
            return 1

    masks = Computed()
    optimizer = SparseOpt([p], lr=0.1, momentum=0.9, masks=masks, backend=backend.name)
    thresholds = (0.1, 0.1, 0.1, 0.3, 0.5, 0.5, 0.7, 0.9)
    for threshold in thresholds:
        masks.threshold = threshold
        optimizer.step()
        assert int(p.count_nonzero()) == int((scores > threshold).sum())
    assert memory.given_again > len(thresholds)
