"""Dense checkpoints and masked models."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import sparseopt_kernels as sk
from sparseopt_kernels.finished.load_dense import register_load_advice, remove_load_advice

ADVICE = "a dense checkpoint? sparseopt_kernels.load_dense(model, state_dict) keeps the masks"


def dense(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def masked() -> tuple[Any, sk.Masks]:
    model = dense()
    masks = sk.sparsify(model, 0.5)
    for layer in (model[0], model[3]):
        register_load_advice(layer)
    return model, masks


class TestLoadDense:
    def test_masks_stay_and_weights_outside_them_are_zeroed(self) -> None:
        model, masks = masked()
        before = {name: masks[p].clone() for name, p in masks.named().items()}
        checkpoint = dense(1).state_dict()
        sk.load_dense(model, checkpoint)
        for name, tensor in checkpoint.items():
            mask = before.get(name)
            expected = tensor if mask is None else torch.where(mask, tensor, 0.0)
            assert torch.equal(model.state_dict()[name], expected), name
        assert all(torch.equal(masks[p], before[name]) for name, p in masks.named().items())

    def test_the_checkpoint_is_not_written(self) -> None:
        model, _ = masked()
        checkpoint = dense(1).state_dict()
        before = copy.deepcopy(checkpoint)
        sk.load_dense(model, checkpoint)
        assert list(checkpoint) == list(before)
        assert all(torch.equal(checkpoint[name], before[name]) for name in before)

    def test_what_finalize_leaves_loads(self) -> None:
        model, _ = masked()
        sk.load_dense(model, sk.finalize(copy.deepcopy(model)).state_dict())

    def test_a_model_pruned_by_pytorch_keeps_its_mask(self) -> None:
        model = dense()
        prune.random_unstructured(model[0], "weight", amount=0.5)
        mask = model[0].weight_mask.clone()
        checkpoint = dense(1).state_dict()
        sk.load_dense(model, checkpoint)
        assert torch.equal(model[0].weight_mask, mask)
        assert torch.equal(model[0].weight_orig, checkpoint["0.weight"] * mask)
        model(torch.randn(5, 4))
        assert torch.equal(model[0].weight, checkpoint["0.weight"] * mask)

    def test_a_mask_that_is_no_part_of_the_state_dict(self) -> None:
        model = dense()
        mask = torch.rand(6, 4) < 0.5
        model[0].register_buffer("weight_mask", mask.clone(), persistent=False)
        sk.load_dense(model, dense(1).state_dict())
        assert torch.equal(model[0].weight, torch.where(mask, dense(1)[0].weight, 0.0))

    def test_the_next_step_clears_momentum_outside_and_keeps_the_mask(self) -> None:
        model, masks = masked()
        opt = sk.SparseOpt(model.parameters(), lr=0.1, momentum=0.9, masks=masks)
        for _ in range(2):
            opt.zero_grad()
            model(torch.randn(8, 4)).sum().backward()
            opt.step()
            sk.load_dense(model, dense(1).state_dict())
        opt.step()
        assert all(not p[~mask].any() for p, mask in masks.items())

    @pytest.mark.parametrize("key", ["0.weight", "0.bias", "1.running_mean"])
    def test_a_missing_key_is_named(self, key: str) -> None:
        model, _ = masked()
        checkpoint = dense(1).state_dict()
        del checkpoint[key]
        with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{key}"\. $') as error:
            sk.load_dense(model, checkpoint)
        assert "dense checkpoint" not in str(error.value)

    def test_unexpected_keys_are_named(self) -> None:
        model, _ = masked()
        prefixed = {f"module.{name}": tensor for name, tensor in dense(1).state_dict().items()}
        with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "module\.0\.weight"'):
            sk.load_dense(model, prefixed)
        sk.load_dense(nn.ModuleDict({"module": model}), prefixed)

    def test_after_an_error_weights_outside_the_masks_are_zero(self) -> None:
        model, masks = masked()
        checkpoint = dense(1).state_dict()
        checkpoint["3.weight"] = torch.ones(3, 7)
        with pytest.raises(RuntimeError, match=r"size mismatch for 3\.weight"):
            sk.load_dense(model, checkpoint)
        assert all(not p[~mask].any() for p, mask in masks.items())

    def test_a_checkpoint_with_masks_is_an_error(self) -> None:
        model, _ = masked()
        with pytest.raises(ValueError, match=r"has the mask '0\.weight_mask': use model\.load_state_dict"):
            sk.load_dense(model, model.state_dict())

    def test_a_model_without_masks_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="has no mask"):
            sk.load_dense(dense(), dense(1).state_dict())

    def test_versions_of_modules_are_kept(self) -> None:
        """BatchNorm of version 1 had no ``num_batches_tracked``: the metadata say so."""
        model, _ = masked()
        old = dense(1).state_dict()
        del old["1.num_batches_tracked"]
        old._metadata["1"]["version"] = 1
        sk.load_dense(model, old)


@pytest.mark.parametrize(
    "duplicate",
    [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["itself", "deepcopy", "pickle"],
)
class TestTheErrorOfLoadStateDict:
    def test_names_load_dense_once(self, duplicate) -> None:
        model = duplicate(masked()[0])
        with pytest.raises(RuntimeError) as error:
            model.load_state_dict(dense(1).state_dict())
        message = str(error.value)
        assert message.count(ADVICE) == 1
        assert '"0.weight_mask' in message
        assert '"3.weight_mask"' in message

    def test_strict_false_is_as_without_advice(self, duplicate) -> None:
        model, bare = duplicate(masked()[0]), masked()[0]
        for layer in (bare[0], bare[3]):
            remove_load_advice(layer)
        found = model.load_state_dict(dense(1).state_dict(), strict=False)
        plain = bare.load_state_dict(dense(1).state_dict(), strict=False)
        assert found == plain
        assert repr(found) == repr(plain)
        assert found.missing_keys[0] in {"0.weight_mask"}
        assert json.dumps(found.missing_keys) == json.dumps(plain.missing_keys)
        assert ", ".join(found.missing_keys) == ", ".join(plain.missing_keys)

    def test_of_one_layer_and_of_a_wrapper(self, duplicate) -> None:
        model = duplicate(masked()[0])
        with pytest.raises(RuntimeError, match="dense checkpoint"):
            model[0].load_state_dict(dense(1)[0].state_dict())
        wrapped = nn.ModuleDict({"module": model})
        with pytest.raises(RuntimeError, match="dense checkpoint"):
            wrapped.load_state_dict({f"module.{k}": v for k, v in dense(1).state_dict().items()})


def test_no_advice_where_the_weight_is_missing_too() -> None:
    with pytest.raises(RuntimeError, match=r"Missing key\(s\)") as error:
        masked()[0].load_state_dict({})
    assert "dense checkpoint" not in str(error.value)


def test_a_checkpoint_with_masks_loads_without_a_word(recwarn: pytest.WarningsRecorder) -> None:
    model, _ = masked()
    recwarn.clear()
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert not recwarn.list


def test_advice_is_registered_once() -> None:
    model, _ = masked()
    register_load_advice(model[0])
    assert len(model[0]._load_state_dict_post_hooks) == 1


def test_a_masked_checkpoint_loads_into_a_model_sparsified_first() -> None:
    """The reverse, as the guide has it."""
    model, _ = masked()
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "0\.weight_mask"'):
        dense().load_state_dict(model.state_dict())
    other = dense(1)
    sk.sparsify(other, 0.5, seed=1)
    other.load_state_dict(model.state_dict())
    dense().load_state_dict(sk.finalize(other).state_dict())
