"""Models that ``torch.nn.utils.prune`` has masked: their masks work as they are, and stay what they are."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from side_by_side import same_bits
from torch import Tensor, nn
from torch.nn.utils import prune

from sparseopt_kernels.masks.mapping import Masks
from sparseopt_kernels.masks.registered_masks import masked_parameters, registered_masks
from sparseopt_kernels.optimizer import SparseOpt


def make_model(dtype: torch.dtype = torch.float32) -> Any:
    """A pruned model whose last layer has an active bias of two."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 10)).to(dtype)
    prune.ln_structured(model[0], "weight", amount=0.5, n=2, dim=0)
    prune.l1_unstructured(model[3], "weight", amount=0.9)
    prune.l1_unstructured(model[3], "bias", amount=0.8)
    return model


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(2, 3, 4, 4, generator=generator).to(model[0].weight_orig.dtype)
        optimizer.zero_grad()
        model(x).float().square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks_are_found_and_stay_floating_point(dtype: torch.dtype) -> None:
    model = make_model(dtype)
    masks = Masks(model)
    assert list(masks.named()) == ["0.weight_orig", "3.weight_orig", "3.bias_orig"]
    assert masks[model[3].weight_orig] is model[3].weight_mask
    assert masks.nnz() == 4 * 27 + 32 + 2
    assert masks.fan_in(model[0].weight_orig).tolist() == [27 * int(m.any()) for m in model[0].weight_mask]
    before = [mask.clone() for mask in masks.values()]
    train(model, SparseOpt(model.parameters(), lr=0.1, momentum=0.9, masks=masks))
    assert [mask.dtype for mask in masks.values()] == [dtype] * 3
    assert all(same_bits(mask, old) for mask, old in zip(masks.values(), before, strict=True))
    for parameter, mask in masks.items():
        assert not parameter[mask == 0].any()
        assert parameter[mask == 1].all()


def test_steps_are_those_of_boolean_masks() -> None:
    """To the last bit; as a mapping of the user's, too."""
    model, twin = make_model(), make_model()
    masks = Masks(model)
    train(model, SparseOpt(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, masks=masks))
    own = {p: mask.bool() for p, mask in Masks(twin).items()}
    train(twin, SparseOpt(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, masks=own))
    assert all(same_bits(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_floating_point_mask_that_is_written_is_seen() -> None:
    model = make_model()
    masks = Masks(model)
    optimizer = SparseOpt(model.parameters(), lr=0.1, momentum=0.9, masks=masks)
    train(model, optimizer)
    weight, mask = model[3].weight_orig, model[3].weight_mask
    mask[0] = 0.0
    train(model, optimizer, 1)
    assert not weight[0].any()
    assert not optimizer.state[weight]["momentum_buffer"][0].any()
    mask[1] = 0.5
    before = weight.detach().clone()
    with pytest.raises(
        ValueError, match=r"'3\.weight_orig' has dtype torch\.float32 and 32 values that are neither"
    ):
        train(model, optimizer, 1)
    assert same_bits(weight, before)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_of_a_copy(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = make_model()
    with torch.no_grad():
        model(torch.ones(2, 3, 4, 4))  # PyTorch copies no tensor that a gradient flows through
    assert list(Masks(duplicate(model)).named()) == list(Masks(model).named())


def test_beside_masks_of_sparsify() -> None:
    model = make_model()
    prune.remove(model[0], "weight")
    model[0].register_buffer("weight_mask", torch.rand(8, 3, 3, 3) < 0.5)
    assert [(name, Masks(model)[p].dtype) for name, p in Masks(model).named().items()] == [
        ("0.weight", torch.bool),
        ("3.weight_orig", torch.float32),
        ("3.bias_orig", torch.float32),
    ]


def test_initial_weights_kept_for_rewinding_are_no_pruning() -> None:
    """``weight_orig`` is a likely name for them."""
    layer = nn.Linear(6, 4)
    layer.weight_orig = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    layer.register_buffer("weight_mask", torch.rand(4, 6) < 0.5)
    assert list(Masks(layer).named()) == ["weight"]


FOREIGN: dict[str, Callable[[nn.Linear], Tensor]] = {
    "float": lambda layer: torch.ones(4),
    "bias-of-attention": lambda layer: torch.zeros(7, 7),
    "another-shape": lambda layer: torch.ones(6, dtype=torch.bool),
    "integer": lambda layer: torch.ones(4, dtype=torch.int64),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_buffer_of_the_users_is_left_alone(kind: str) -> None:
    """``bias_mask`` beside a bias is a mask only where it is boolean and of its shape."""
    layer = nn.Linear(6, 4)
    layer.register_buffer("weight_mask", torch.rand(4, 6) < 0.5)
    layer.register_buffer("bias_mask", FOREIGN[kind](layer))
    assert list(registered_masks(masked_parameters(layer))) == [layer.weight]


@pytest.mark.parametrize(
    "norm",
    [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm, nn.utils.spectral_norm],
    ids=["parametrization", "weight_norm", "spectral_norm"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_weight_that_is_computed_later_is_named(norm: Callable[[nn.Module], nn.Module]) -> None:
    model: Any = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    for layer in model:
        layer.register_buffer("weight_mask", torch.ones_like(layer.weight, dtype=torch.bool))
    norm(model[1])
    with pytest.warns(UserWarning, match=r"^a mask is left out: '1\.weight' has a mask, but") as caught:
        masks = Masks(model)
    assert [record.filename for record in caught] == [__file__]
    assert list(masks.named()) == ["0.weight", "2.weight"]
    norm(model[0])
    norm(model[2])
    with pytest.raises(ValueError, match=r"no mask of a parameter: '0\.weight' .* So do 2 more layers"):
        Masks(model)


def test_a_buffer_that_only_ends_like_a_mask_is_not_named() -> None:
    layer = nn.Linear(6, 4)
    layer.register_buffer("weight_mask", torch.rand(4, 6) < 0.5)
    layer.register_buffer("causal_mask", torch.rand(4, 4) < 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(Masks(layer).named()) == ["weight"]
