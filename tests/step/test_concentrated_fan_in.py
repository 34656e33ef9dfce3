"""The warning of a layer in which Eq. 12 makes a c_i larger than 3."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from backends import Backend
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from sparseopt_kernels import kernels
from sparseopt_kernels.kernels.contract import ParamState
from sparseopt_kernels.masks.mapping import Masks
from sparseopt_kernels.optimizer import SparseOpt

CONCENTRATED = r"fan-in is concentrated"


def concentrated(rows: int = 20, columns: int = 20) -> Tensor:
    """One neuron has all weights, all others have one: with 20 of 20, c is sqrt(20 * 20 / 39) = 3.2."""
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    mask[:, 0] = True
    mask[0] = True
    return mask


def even(rows: int = 20, columns: int = 20) -> Tensor:
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    mask[:, :2] = True
    return mask


def network(mask: Tensor) -> nn.Sequential:
    """Two layers of one shape, with that mask both."""
    model = nn.Sequential()
    for i in range(2):
        layer = nn.Linear(mask.shape[1], mask.shape[0])
        layer.register_buffer("weight_mask", mask.clone())
        model.add_module(f"layer{i}", layer)
    return model


def step(optimizer: SparseOpt) -> list[str]:
    """The warnings of a step."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    return [str(w.message) for w in caught if "fan-in" in str(w.message)]


def stepping(model: nn.Module, backend: Backend, **options: Any) -> SparseOpt:
    return SparseOpt(
        model.parameters(), lr=0.1, momentum=0.9, masks=Masks(model), backend=backend.name, **options
    )


def test_once_for_each_layer(backend: Backend) -> None:
    model: Any = network(even())
    optimizer = stepping(model, backend)
    assert step(optimizer) == []
    model.layer1.weight_mask.copy_(concentrated())
    (warning,) = step(optimizer)
    assert "'layer1.weight'" in warning
    assert "c_i = 3.20" in warning
    assert "its fan-in is 20, the mean of the layer 1.9" in warning
    assert "correction='none'" in warning
    model.layer0.weight_mask.copy_(concentrated())
    model.layer1.weight_mask.copy_(~concentrated())
    (warning,) = step(optimizer)
    assert "'layer0.weight'" in warning
    model.layer1.weight_mask.copy_(concentrated())
    assert [step(optimizer) for _ in range(3)] == [[], [], []]
    assert len(step(stepping(model, backend))) == 2  # another optimizer


def test_points_to_the_step_of_the_caller(backend: Backend) -> None:
    p = Parameter(torch.ones(20, 20))
    p.grad = torch.ones(20, 20)
    optimizer = SparseOpt([p], masks={p: concentrated()}, backend=backend.name)
    with pytest.warns(UserWarning, match=CONCENTRATED) as caught:
        optimizer.step()
    assert [w.filename for w in caught if "fan-in" in str(w.message)] == [__file__]


@pytest.mark.parametrize(("others", "warned"), [(11, False), (10, False), (9, True)])
def test_of_more_than_3(backend: Backend, others: int, warned: bool) -> None:
    """One of 18 neurons has 10 weights, the others one each at most: c^2 is 180 / (10 + others)."""
    mask = torch.zeros(18, 20, dtype=torch.bool)
    mask[0, :10] = True
    mask[1 : 1 + others, 0] = True
    p = Parameter(torch.zeros(18, 20))
    assert bool(step(SparseOpt([p], masks={p: mask}, backend=backend.name))) == warned


@pytest.mark.parametrize(
    "options",
    [{"correction": "none"}, {"correction": "unnormalized"}, {"correction": "auto", "feeding_norm": {}}],
    ids=lambda options: options["correction"],
)
def test_not_without_eq_12(backend: Backend, options: dict[str, Any]) -> None:
    model = network(concentrated())
    optimizer = stepping(model, backend, **options)
    assert step(optimizer) == []
    optimizer.param_groups[0]["correction"] = "layer"
    assert len(step(optimizer)) == 2


def test_with_auto_of_what_feeds_a_norm(backend: Backend) -> None:
    model: Any = network(concentrated())
    feeding_norm = {"layer1.weight": model.layer1.weight}
    (warning,) = step(stepping(model, backend, correction="auto", feeding_norm=feeding_norm))
    assert "'layer1.weight'" in warning


def test_neurons_of_a_transposed_convolution(backend: Backend) -> None:
    """Along dimension 1: as rows, the same mask is even."""
    for transposed in (False, True):
        layer: nn.Module = nn.ConvTranspose1d(20, 20, 1) if transposed else nn.Conv1d(20, 20, 1)
        mask = torch.zeros(20, 20, 1, dtype=torch.bool)
        mask[:, 0] = True
        layer.register_buffer("weight_mask", mask)
        assert bool(step(stepping(layer, backend))) == transposed


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 3), (5, 5)])
def test_of_no_weights_at_all(backend: Backend, shape: tuple[int, ...]) -> None:
    p = Parameter(torch.zeros(shape))
    mask = torch.zeros(shape, dtype=torch.bool)
    assert step(SparseOpt([p], masks={p: mask}, backend=backend.name)) == []


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "load_state_dict"])
def test_not_again_in_a_copy_or_after_loading(backend: Backend, how: str) -> None:
    model: Any = network(even())
    model.layer0.weight_mask.copy_(concentrated())
    optimizer = stepping(model, backend)
    assert len(step(optimizer)) == 1
    if how == "deepcopy":
        model, optimizer = copy.deepcopy((model, optimizer))
    elif how == "pickle":
        model, optimizer = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        optimizer.load_state_dict(optimizer.state_dict())
    assert step(optimizer) == []
    model.layer1.weight_mask.copy_(concentrated())
    assert len(step(optimizer)) == 1


def test_as_an_error_it_leaves_nothing_half_written(backend: Backend) -> None:
    model: Any = network(even())
    optimizer = stepping(model, backend)
    step(optimizer)
    former = copy.deepcopy((model, optimizer.state_dict()))
    for layer in model:
        layer.weight_mask.copy_(concentrated())
    for layer in ("layer0", "layer1"):  # one after another
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match=rf"'{layer}\.weight': {CONCENTRATED}"):
                optimizer.step()
        for p, q in zip(model.parameters(), former[0].parameters(), strict=True):
            assert torch.equal(p, q)
        for now, then in zip(
            optimizer.state_dict()["state"].values(), former[1]["state"].values(), strict=True
        ):
            assert torch.equal(now["momentum_buffer"], then["momentum_buffer"])
    assert step(optimizer) == []
    assert not model.layer0.weight[1:, 1:].any()


def test_only_masks_that_changed_are_counted(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = network(even())
    optimizer = stepping(model, backend)
    for _ in range(2):
        step(optimizer)
    counted: list[ParamState] = []
    counting = kernels.BACKENDS[backend.name]
    fan_in = counting.fan_in

    def count(params: Sequence[ParamState]) -> Tensor:
        counted.extend(params)
        return fan_in(params)

    monkeypatch.setattr(counting, "fan_in", count)
    step(optimizer)
    model.layer0.bias.grad = None  # all is prepared anew
    optimizer.step()
    assert counted == []
    model.layer1.weight_mask.copy_(even().flip(1))
    step(optimizer)
    assert len(counted) == 1
    assert counted[0].given_mask is model.layer1.weight_mask


def test_what_is_advised_depends_on_the_clip_of_the_group(backend: Backend) -> None:
    model = network(concentrated())
    limits = {model[0]: None, model[1]: 1.0}
    groups = [{"params": layer.parameters(), "max_grad_norm": limit} for layer, limit in limits.items()]
    optimizer = SparseOpt(groups, lr=0.1, masks=Masks(model), backend=backend.name)
    plain, clipped = step(optimizer)
    assert "'layer0.weight'" in plain
    assert "but little if gradients are clipped: set max_grad_norm=1. Compare" in plain
    assert "'layer1.weight'" in clipped
    assert "but little if gradients are clipped, as they are. Compare" in clipped
