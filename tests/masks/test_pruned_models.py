"""Models that ``torch.nn.utils.prune`` has masked: what is said of them, and that its advice works."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from sparseopt_kernels.layers import pruned_by_pytorch
from sparseopt_kernels.masks import Masks
from sparseopt_kernels.optimizer import SparseOpt
from sparseopt_kernels.topology.sparsify import sparsify


def make_model() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 10))


def refusal(model: nn.Module) -> str:
    """What is said of a model that has no mask of ours."""
    with pytest.raises(ValueError, match=r"pruned by torch\.nn\.utils\.prune") as caught:
        Masks(model)
    return str(caught.value)


def warning(model: nn.Module) -> tuple[str, Masks]:
    """What is said of a model that has masks of ours, too; and those masks."""
    with pytest.warns(UserWarning, match=r"^a mask is left out: .* was pruned by") as caught:
        masks = Masks(model)
    assert [record.filename for record in caught] == [__file__]
    return str(caught[0].message), masks


def follow(message: str, layer: nn.Module) -> None:
    """Do with a layer exactly what the message says."""
    recipe = re.search(r"For each such layer: (.*)\. Then call Masks\(model\) again", message)
    assert recipe is not None
    exec(recipe[1], {"torch": torch, "layer": layer})


class TestMasks:
    def test_what_is_said_of_one_layer(self) -> None:
        model = make_model()
        prune.random_unstructured(model[3], "weight", amount=0.75)
        assert refusal(model) == (
            "'3.weight' was pruned by torch.nn.utils.prune (its layer has the parameter weight_orig and a "
            "float weight_mask). For each such layer: mask = layer.weight_mask.bool(); "
            "torch.nn.utils.prune.remove(layer, 'weight'); layer.register_buffer('weight_mask', mask). "
            "Then call Masks(model) again"
        )

    def test_the_others_are_counted(self) -> None:
        model = make_model()
        prune.random_unstructured(model[0], "weight", amount=0.5)
        prune.random_unstructured(model[3], "bias", amount=0.5)
        prune.random_unstructured(model[3], "weight", amount=0.5)
        message = refusal(model)
        assert message.startswith("'0.weight' was pruned")
        assert "and so were 2 more. For each" in message

    def test_a_bare_layer_and_its_bias(self) -> None:
        layer = prune.l1_unstructured(nn.Linear(6, 4), "bias", amount=0.5)
        message = refusal(layer)
        assert message.startswith("'bias' was pruned")
        follow(message, layer)
        masks = Masks(layer)
        assert list(masks.named()) == ["bias"]
        assert masks.nnz() == 2

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_following_the_advice_keeps_network_and_sparsity(self, dtype: torch.dtype) -> None:
        model = make_model().to(dtype)
        prune.ln_structured(model[0], "weight", amount=0.5, n=2, dim=0)
        prune.l1_unstructured(model[3], "weight", amount=0.9)
        model(torch.randn(2, 3, 4, 4, dtype=dtype))
        optimizer_sees = [model[0].weight_orig, model[3].weight_orig]
        expected = [layer.weight_mask.bool() for layer in (model[0], model[3])]
        model.eval()
        x = torch.randn(2, 3, 4, 4, dtype=dtype)
        before = model(x)
        message = refusal(model)
        follow(message, model[0])
        follow(message, model[3])

        masks = Masks(model)
        assert list(masks.named()) == ["0.weight", "3.weight"]
        assert masks.nnz() == 4 * 27 + 32
        assert all(torch.equal(*pair) for pair in zip(masks.values(), expected, strict=True))
        assert all(ours is theirs for ours, theirs in zip(masks, optimizer_sees, strict=True))
        assert torch.equal(model(x), before)

        optimizer = SparseOpt(model.parameters(), lr=0.1, momentum=0.9, masks=masks)
        values = [parameter.detach().clone() for parameter in masks]
        model(x).float().square().sum().backward()
        optimizer.step()
        for parameter, mask, value in zip(masks, expected, values, strict=True):
            assert not parameter[~mask].any()
            assert not torch.equal(parameter, value)

    def test_one_layer_pruned_by_each(self) -> None:
        model = make_model()
        model[0].register_buffer("weight_mask", torch.rand(8, 3, 3, 3) < 0.5)
        prune.random_unstructured(model[3], "weight", amount=0.75)
        message, masks = warning(model)
        assert list(masks.named()) == ["0.weight"]
        assert masks[model[0].weight] is model[0].weight_mask
        follow(message, model[3])
        assert list(Masks(model).named()) == ["0.weight", "3.weight"]
        assert Masks(model).fan_in(model[3].weight).sum() == 80

    @pytest.mark.parametrize(
        "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
    )
    def test_of_a_copy_the_same_is_said(self, duplicate: Callable[[nn.Module], nn.Module]) -> None:
        model = make_model()
        prune.random_unstructured(model[3], "weight", amount=0.75)
        with torch.no_grad():
            model(torch.ones(2, 3, 4, 4))  # PyTorch copies no tensor that a gradient flows through
        message = refusal(model)
        assert refusal(duplicate(model)) == message
        model[0].register_buffer("weight_mask", torch.rand(8, 3, 3, 3) < 0.5)
        for pruned in (model, duplicate(model)):
            assert warning(pruned)[0] == f"a mask is left out: {message}"

    def test_a_mask_that_does_not_fit_is_an_error_beside_a_pruned_layer(self) -> None:
        model = make_model()
        model[0].register_buffer("weight_mask", torch.ones(8, 3, 3, 3))
        prune.random_unstructured(model[3], "weight", amount=0.75)
        with pytest.raises(ValueError, match=r"mask for '0\.weight' has dtype torch\.float32"):
            Masks(model)

    def test_initial_weights_kept_for_rewinding_are_no_pruning(self) -> None:
        # weight_orig is a likely name for them.
        layer = nn.Linear(6, 4)
        layer.weight_orig = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        layer.register_buffer("weight_mask", torch.rand(4, 6) < 0.5)
        assert pruned_by_pytorch(layer) == []
        assert list(Masks(layer).named()) == ["weight"]


class TestSparsify:
    def test_a_mixed_model(self) -> None:
        model = make_model()
        prune.random_unstructured(model[3], "weight", amount=0.75)
        before = model[3].weight_mask.clone()
        message = refusal(model)
        with pytest.warns(UserWarning, match="is left out") as caught:
            masks = sparsify(model, 0.5)
        assert [str(record.message) for record in caught] == [
            "layer '3' is left out: its weight is not a parameter (pruned by torch.nn.utils.prune)",
            f"a mask is left out: {message}",
        ]
        assert list(masks.named()) == ["0.weight"]
        assert masks.nnz() == 108
        assert torch.equal(model[3].weight_mask, before)
        # What it has made is found again.
        assert list(warning(model)[1]) == list(masks)
        # As the warning says; afterwards the model has both masks.
        follow(message, model[3])
        assert list(Masks(model).named()) == ["0.weight", "3.weight"]
        assert torch.equal(model[3].weight_mask, before.bool())

    def test_a_parametrized_layer_is_not_called_pruned(self) -> None:
        model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
        with pytest.warns(UserWarning, match=r"layer '0' is left out: .* \(parametrized\)$"):
            masks = sparsify(model, 0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert list(Masks(model).named()) == list(masks.named()) == ["1.weight"]

    def test_after_the_advice_there_is_nothing_left_to_mask(self) -> None:
        layer = prune.l1_unstructured(nn.Linear(6, 4), "weight", amount=0.5)
        with (
            pytest.warns(
                UserWarning, match=r"layer '' is left out: .* \(pruned by torch\.nn\.utils\.prune\)$"
            ),
            pytest.raises(ValueError, match="nothing to mask"),
        ):
            sparsify(layer, 0.5)
        follow(refusal(layer), layer)
        with pytest.raises(ValueError, match=r"'weight' has a mask already .*: use Masks\(model\)"):
            sparsify(layer, 0.5)
