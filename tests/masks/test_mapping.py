"""Masks that live in a model: as a mapping, in checkpoints, in copies."""

import copy
import io
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from masked_model import NAMES, assert_same, make_model, masks_of

from sparseopt_kernels.masks.mapping import Masks
from sparseopt_kernels.masks.registered_masks import check_mask
from sparseopt_kernels.neurons import Neurons
from sparseopt_kernels.topology.sparsify import sparsify


class TestMasks:
    def make(self) -> tuple[Any, Masks]:
        model = make_model()
        return model, sparsify(model, 0.8)

    def test_it_is_a_mapping_in_model_order(self):
        model, masks = self.make()
        assert isinstance(masks, Mapping)
        assert len(masks) == 4
        assert list(masks.named()) == NAMES
        assert [id(p) for p in masks] == [id(model.get_parameter(name)) for name in NAMES]
        assert masks[model["fc"].weight] is model["fc"].weight_mask
        assert model["fc"].weight in masks
        assert model["fc"].bias not in masks
        assert masks.get(model["fc"].bias) is None
        with pytest.raises(KeyError):
            masks[model["fc"].bias]

    def test_comparison_and_hash_are_by_identity(self):
        model, masks = self.make()
        assert masks == masks
        assert masks != Masks(model)
        assert {masks: 1}[masks] == 1

    def test_counts(self):
        model, masks = self.make()
        total = sum(int(mask.sum()) for mask in masks_of(model).values())
        numel = sum(parameter.numel() for parameter in masks)
        assert masks.nnz() == total
        assert masks.sparsity() == pytest.approx(1 - total / numel)
        assert repr(masks) == f"Masks(4 parameters, {total} active weights, sparsity {1 - total / numel:.4f})"

    def test_fan_in_goes_by_the_layer(self):
        model, masks = self.make()
        fan_in_of_fc = masks.fan_in(model["fc"].weight)
        assert torch.equal(fan_in_of_fc, model["fc"].weight_mask.sum(1))
        assert masks.neurons(model["fc"].weight) == Neurons()
        assert masks.neurons(model["up"].weight) == Neurons(dim=1, groups=3)
        assert masks.fan_in(model["up"].weight).shape == (6,)

    def test_writes_in_place_and_replaced_buffers_are_seen(self):
        model, masks = self.make()
        model["fc"].weight_mask.fill_(True)
        assert masks[model["fc"].weight].all()
        model["fc"].weight_mask = torch.zeros(10, 20, dtype=torch.bool)
        assert not masks[model["fc"].weight].any()

    def test_the_masks_are_in_the_state_dict(self):
        model, masks = self.make()
        state = model.state_dict()
        assert [name for name in state if name.endswith("_mask")] == [f"{name}_mask" for name in NAMES]
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        other = make_model()
        other_masks = sparsify(other, 0.8, seed=1)
        other.load_state_dict(torch.load(file, weights_only=True))
        for mine, theirs in zip(masks.values(), other_masks.values(), strict=True):
            assert theirs.dtype == torch.bool
            assert torch.equal(mine, theirs)

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    def test_a_copied_model_can_be_adopted(self, duplicate):
        model, masks = self.make()
        twin = duplicate(model)
        twin_masks = Masks(twin)
        assert list(twin_masks.named()) == NAMES
        twin["fc"].weight_mask.fill_(True)
        assert twin_masks[twin["fc"].weight].all()
        assert not masks[model["fc"].weight].all()
        assert model["fc"].weight not in twin_masks

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    def test_masks_copied_with_their_model_belong_to_the_copy(self, duplicate):
        model, masks = self.make()
        twin, twin_masks = duplicate((model, masks))
        assert twin_masks[twin["fc"].weight] is twin["fc"].weight_mask
        assert model["fc"].weight not in twin_masks
        assert twin_masks.nnz() == masks.nnz()

    @pytest.mark.parametrize(
        "arguments",
        [
            {"dtype": torch.bfloat16},
            {"dtype": torch.float64},
            {"memory_format": torch.channels_last},
            {"device": "cpu"},
        ],
        ids=str,
    )
    def test_to(self, arguments):
        model, masks = self.make()
        before = {name: mask.clone() for name, mask in masks_of(model).items()}
        model.to(**arguments)
        assert_same(masks_of(model), before)
        for parameter, mask in masks.items():
            assert mask.dtype == torch.bool
            assert mask.stride() == parameter.stride()

    def test_a_mask_registered_by_hand_is_found(self):
        model = make_model()
        model["fc"].register_buffer("weight_mask", torch.rand(10, 20) < 0.5)
        model["fc"].register_buffer("bias_mask", torch.ones(10, dtype=torch.bool))
        assert list(Masks(model).named()) == ["fc.weight", "fc.bias"]

    def test_no_mask_is_an_error(self):
        with pytest.raises(ValueError, match=r"the model has no mask: call sparsify"):
            Masks(make_model())

    @pytest.mark.parametrize(
        ("mask", "message"),
        [
            (torch.ones(20, 10, dtype=torch.bool), r"'fc\.weight' has shape \(20, 10\), .* has \(10, 20\)"),
            (
                torch.full((10, 20), 0.5),
                r"'fc\.weight' has dtype torch\.float32 and 200 values that are neither",
            ),
            (torch.ones(10, 20, dtype=torch.uint8), r"'fc\.weight' has dtype torch\.uint8, it must be"),
            (torch.ones(10, 20, dtype=torch.bool, device="meta"), r"'fc\.weight' is on meta, .* is on cpu"),
        ],
    )
    def test_an_unfit_mask_is_an_error(self, mask, message):
        model = make_model()
        model["fc"].register_buffer("weight_mask", mask)
        with pytest.raises(ValueError, match=message):
            Masks(model)

    def test_check_mask_wants_a_tensor(self):
        with pytest.raises(ValueError, match="mask for 'w' is a list, it must be a boolean tensor"):
            check_mask([True], torch.ones(1), "w")  # type: ignore[arg-type]
