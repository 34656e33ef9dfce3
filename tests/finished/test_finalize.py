"""A masked model becomes a plain dense one."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from masked_model import make_model
from torch import nn
from torch.nn.utils import prune

import sparseopt_kernels as sk
from sparseopt_kernels.finished.load_dense import register_load_advice


def small() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def test_the_state_dict_is_that_of_the_dense_model() -> None:
    model = make_model()
    dense = list(model.state_dict())
    sk.sparsify(model, 0.8)
    assert sk.finalize(model) is model
    assert list(model.state_dict()) == dense
    make_model().load_state_dict(model.state_dict())


class TestATrainedDenseModel:
    """An optimizer that does not know the masks has moved weights outside of them."""

    def test_is_warned_of(self) -> None:
        model = small()
        sk.sparsify(model, 0.5)
        model[0].weight.data.fill_(7.0)
        with pytest.warns(UserWarning, match=r"^1\d of 21 weights outside the masks are not 0, and finalize"):
            sk.finalize(model)

    def test_to_sparse_warns_too(self) -> None:
        model = small()
        sk.sparsify(model, 0.5)
        model[0].weight.data.fill_(7.0)
        with pytest.warns(UserWarning, match="and finalize sets them to 0"):
            sk.to_sparse(model)

    @pytest.mark.filterwarnings("error")
    def test_a_mask_that_has_just_become_smaller_is_not(self) -> None:
        model = small()
        masks = sk.sparsify(model, 0.5, min_fan_in=1)
        masks[model[0].weight][:2] = False
        sk.finalize(model)

    @pytest.mark.filterwarnings("error")
    def test_nor_one_that_prune_has_made(self) -> None:
        model = small()
        prune.random_unstructured(model[0], "weight", 0.9)
        sk.finalize(model)

    @pytest.mark.filterwarnings("error")
    def test_nor_one_without_values(self) -> None:
        model = small().to("meta")
        model[0].register_buffer("weight_mask", torch.ones(6, 4, dtype=torch.bool, device="meta"))
        sk.finalize(model)


def test_weights_outside_the_masks_are_zeroed_first() -> None:
    model = small()
    masks = sk.sparsify(model, 0.5)
    kept = {name: masks[p].clone() for name, p in masks.named().items()}
    with torch.no_grad():
        for p in masks:
            p.fill_(7.0)
    sk.finalize(model)
    for name, mask in kept.items():
        assert torch.equal(model.get_parameter(name), torch.where(mask, 7.0, 0.0))


def test_parameters_stay_the_same_objects() -> None:
    model = small()
    prune.random_unstructured(model[0], "weight", amount=0.5)
    sk.sparsify(model[3], 0.5)
    before = [*model.parameters()]
    sk.finalize(model)
    assert {id(p) for p in before} == {id(p) for p in model.parameters()}


def test_masks_of_torch_prune_are_removed() -> None:
    model = small()
    dense = list(model.state_dict())
    prune.random_unstructured(model[0], "weight", amount=10)
    prune.random_unstructured(model[3], "bias", amount=1)
    mask = model[0].weight_mask.bool()
    expected = torch.where(mask, model[0].weight_orig.detach(), 0.0)
    sk.finalize(model)
    assert sorted(model.state_dict()) == sorted(dense)
    assert torch.equal(model[0].weight, expected)
    assert int(model[3].bias.count_nonzero()) == 2
    assert not prune.is_pruned(model)
    model(torch.randn(5, 4)).sum().backward()
    assert model[0].weight.grad is not None


def test_foreign_buffers_stay() -> None:
    model = small()
    model.register_buffer("window", torch.ones(3))
    model[3].register_buffer("bias_mask", torch.tensor([0.5, 1.0, 2.0]))
    sk.sparsify(model[0], 0.5)
    sk.finalize(model)
    assert "window" in model.state_dict()
    assert model[3].bias_mask.tolist() == [0.5, 1.0, 2.0]


def test_a_weight_that_two_layers_share_loses_both_masks() -> None:
    model: Any = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    model[1].weight = model[0].weight
    sk.sparsify(model, 0.5)
    model[1].register_buffer("weight_mask", model[0].weight_mask)
    sk.finalize(model)
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_in_a_wrapper() -> None:
    model = small()
    sk.sparsify(model, 0.5)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    sk.finalize(averaged)
    small().load_state_dict(averaged.module.state_dict())
    assert sk.Masks(model)  # the model itself is as it was


def test_a_model_without_masks_is_an_error() -> None:
    model = small()
    with pytest.raises(ValueError, match=r"the model has no mask: call sparsify"):
        sk.finalize(model)
    sk.finalize(small_masked(model))
    with pytest.raises(ValueError, match="has no mask"):
        sk.finalize(model)


def small_masked(model: Any) -> Any:
    sk.sparsify(model, 0.5)
    return model


def test_a_mask_that_is_none_is_an_error_before_anything_is_written() -> None:
    model = small()
    sk.sparsify(model[0], 0.5)
    prune.random_unstructured(model[3], "weight", amount=0.5)
    model[3].weight_mask.fill_(0.5)
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    with pytest.raises(ValueError, match=r"'3\.weight_orig' has .* 18 values that are neither 0 nor 1"):
        sk.finalize(model)
    assert model[0].weight.eq(1.0).all()
    assert "0.weight_mask" in model.state_dict()


@pytest.mark.parametrize("steps_before", [0, 1, 3])
def test_a_step_with_the_former_masks_is_an_error(steps_before: int) -> None:
    model = small()
    masks = sk.sparsify(model, 0.5)
    opt = sk.SparseOpt(model.parameters(), lr=0.1, momentum=0.9, masks=masks)
    dst = sk.RigL(masks, update_every=1, stop_at=100, skip_step=False)
    for _ in range(steps_before):
        opt.zero_grad()
        model(torch.randn(8, 4)).sum().backward()
        dst.step()
        opt.step()
    sk.finalize(model)
    before = copy.deepcopy(model.state_dict())
    opt.zero_grad()
    model(torch.randn(8, 4)).sum().backward()
    gone = re.escape("the mask of '0.weight' is gone from the model: make Masks(model) anew")
    with pytest.raises(ValueError, match=gone):
        opt.step()
    with pytest.raises(ValueError, match=gone):
        dst.step()
    for name in ("0.weight", "3.weight"):
        assert torch.equal(model.state_dict()[name], before[name])


def test_a_finalized_model_can_be_sparsified_again() -> None:
    model = small()
    sk.sparsify(model, 0.5)
    sk.sparsify(sk.finalize(model), 0.5)


def test_nothing_of_this_package_is_left_in_the_model() -> None:
    model = small()
    sk.sparsify(model, 0.5)
    for layer in (model[0], model[3]):
        register_load_advice(layer)
    assert b"sparseopt_kernels" in pickle.dumps(model)
    sk.finalize(model)
    assert b"sparseopt_kernels" not in pickle.dumps(model)
