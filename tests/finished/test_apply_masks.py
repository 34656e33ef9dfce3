"""Averages of masked models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sparseopt_kernels as sk


def make() -> tuple[Any, sk.Masks]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 5))
    return model, sk.sparsify(model, 0.8)


def train(model: nn.Module, masks: sk.Masks, averaged: AveragedModel, steps: int = 12) -> None:
    """A RigL run that changes its masks in every step, and averages as it goes."""
    opt = sk.SparseOpt(model.parameters(), lr=0.001, momentum=0.9, masks=masks)
    dst = sk.RigL(masks, drop_fraction=0.5, update_every=1, stop_at=1000, skip_step=False)
    for _ in range(steps):
        opt.zero_grad()
        model(torch.randn(16, 20)).square().mean().backward()
        dst.step()
        opt.step()
        averaged.update_parameters(model)


def active(model: nn.Module) -> int:
    return sum(int(p.count_nonzero()) for name, p in model.named_parameters() if p.ndim > 1)


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("module."): mask.clone()
        for name, mask in model.named_buffers()
        if name.endswith("_mask")
    }


@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_exponential_average_of_a_rigl_run(use_buffers: bool) -> None:
    model, masks = make()
    ema: Any = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
    train(model, masks, ema)
    assert active(ema) > 1.5 * masks.nnz()
    averaged = {name: p.clone() for name, p in ema.module.named_parameters()}
    if use_buffers:
        assert sk.Masks(ema).nnz() > 1.5 * masks.nnz()  # the union of all masks so far

    sk.apply_masks(ema, masks)

    assert active(ema) <= masks.nnz()
    for name, mask in masks_of(model).items():
        assert torch.equal(masks_of(ema)[name], mask)
        weight = name.removesuffix("_mask")
        expected = torch.where(mask, averaged[weight], 0.0)
        assert torch.equal(ema.module.get_parameter(weight), expected)
    assert torch.equal(ema.module[0].bias, averaged["0.bias"])


def test_its_own_masks_are_the_default() -> None:
    """Without ``use_buffers``, PyTorch copies buffers: they are the masks of the last average."""
    model, masks = make()
    ema: Any = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    train(model, masks, ema)
    sk.apply_masks(ema)
    assert 0 < active(ema) <= masks.nnz()
    for name, p in sk.Masks(ema).named().items():
        assert not p[~masks_of(model)[f"{name.removeprefix('module.')}_mask"]].any()


def test_stochastic_weight_averaging() -> None:
    model, masks = make()
    swa = AveragedModel(model)
    train(model, masks, swa)
    assert active(swa) > 1.5 * masks.nnz()
    sk.apply_masks(swa)
    assert 0 < active(swa) <= masks.nnz()


def test_stochastic_weight_averaging_of_buffers_raises_in_torch() -> None:
    """It subtracts boolean masks. The guide says so; should it pass one day, the guide is out of date."""
    model, masks = make()
    with pytest.raises(RuntimeError, match=r"bool"):
        train(model, masks, AveragedModel(model, use_buffers=True))


def test_masks_of_a_wrapped_model_match_too() -> None:
    model, masks = make()
    twin = copy.deepcopy(model)
    for mask in masks.values():
        mask.copy_(mask.flip(0))
    wrapped = nn.ModuleDict({"module": nn.ModuleDict({"_orig_mod": model})})
    sk.apply_masks(twin, sk.Masks(wrapped))
    assert all(torch.equal(masks_of(twin)[name], mask) for name, mask in masks_of(model).items())


def test_a_copy_without_masks_is_masked_all_the_same() -> None:
    model, masks = make()
    twin = sk.finalize(copy.deepcopy(model))
    with torch.no_grad():
        for p in twin.parameters():
            p.fill_(1.0)
    sk.apply_masks(twin, masks)
    assert active(twin) == masks.nnz()
    assert not masks_of(twin)


def test_other_devices_and_dtypes_do_not_matter() -> None:
    model, masks = make()
    twin = copy.deepcopy(model).to(torch.bfloat16)
    with torch.no_grad():
        twin[0].weight.fill_(1.0)
    sk.apply_masks(twin, masks)
    assert torch.equal(twin[0].weight != 0, masks[model[0].weight])


def test_an_average_of_a_model_pruned_by_pytorch() -> None:
    """An exponential average of float masks holds fractions: only the model's own masks help."""
    model: Any = nn.Sequential(nn.Linear(20, 30))
    prune.random_unstructured(model[0], "weight", amount=0.5)
    with torch.no_grad():
        model(torch.randn(1, 20))  # PyTorch copies no model whose computed weight has a history
    ema: Any = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(3):
        model[0].weight_mask.copy_(torch.rand(30, 20) < 0.5)
        ema.update_parameters(model)
    with pytest.raises(ValueError, match=r"'module\.0\.weight_orig' has .* values that are neither 0 nor 1"):
        sk.apply_masks(ema)


class TestErrorsComeBeforeAnythingIsWritten:
    def check(self, model: nn.Module, masks: sk.Masks, message: str) -> None:
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=message):
            sk.apply_masks(model, masks)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    def test_a_mask_without_a_parameter(self) -> None:
        model, masks = make()
        other = nn.Sequential(*model[:3])
        self.check(other, masks, r"masks has a mask for '3\.weight', and the model has no parameter of that")

    def test_a_masked_parameter_without_a_mask(self) -> None:
        model, _ = make()
        self.check(model, sk.Masks(model[:3]), r"the model has a mask for '3\.weight', and masks has none")

    def test_another_shape(self) -> None:
        model, masks = make()
        twin = copy.deepcopy(model)
        twin[3] = nn.Linear(30, 7)
        self.check(
            twin, masks, r"mask of shape \(5, 30\) for '3\.weight', whose shape in the model is \(7, 30\)"
        )

    def test_no_masks_at_all(self) -> None:
        with pytest.raises(ValueError, match="has no mask"):
            sk.apply_masks(nn.Linear(3, 3))

    def test_a_dict(self) -> None:
        model, masks = make()
        with pytest.raises(TypeError, match="masks is a dict, it must be a Masks"):
            sk.apply_masks(model, dict(masks))  # type: ignore[arg-type]
