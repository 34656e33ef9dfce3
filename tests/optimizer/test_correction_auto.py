"""``correction="auto"``: Eq. 12 for the weights in ``feeding_norm``, 1 for all others."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from backends import Backend
from network import Network, assert_same, assert_same_state, each_hyper, run
from refusals import words
from torch import nn
from torch.nn.parameter import Parameter

from sparseopt_kernels.masks.mapping import Masks
from sparseopt_kernels.optimizer import SparseOpt

UNKNOWN = words("correction is 'auto'", "not known", "feeding_norm=")


def automatic(model: Network, backend: Backend, **options: Any) -> SparseOpt:
    """Of a network whose first layer feeds a norm, so we say, and whose second does not."""
    feeding_norm = {"0.weight": model[0].weight}
    return SparseOpt(
        model.parameters(),
        masks=Masks(model),
        correction="auto",
        feeding_norm=feeding_norm,
        backend=backend.name,
        **options,
    )


def by_hand(model: Network, backend: Backend, **options: Any) -> SparseOpt:
    """What ``automatic`` must come to, with a parameter group for each correction."""
    groups: list[dict[str, Any]] = [
        {"params": model[0].parameters(), "correction": "layer"},
        {"params": model[2].parameters(), "correction": "none"},
    ]
    return SparseOpt(groups, masks=Masks(model), backend=backend.name, **options)


@each_hyper
@pytest.mark.parametrize("limit", [None, 0.1], ids=["any-norm", "limited-norm"])
def test_as_with_groups_by_hand(backend: Backend, hyper: dict[str, Any], limit: float | None) -> None:
    model, twin, uncorrected = Network(), Network(), Network()
    run(model, automatic(model, backend, max_grad_norm=limit, **hyper), range(4))
    run(twin, by_hand(twin, backend, max_grad_norm=limit, **hyper), range(4))
    if limit is None:
        assert_same(model, twin)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        # The norm is summed group by group: its last digit depends on how many there are.
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
    options: dict[str, Any] = {"max_grad_norm": limit, "correction": "none", "backend": backend.name}
    run(
        uncorrected,
        SparseOpt(uncorrected.parameters(), masks=Masks(uncorrected), **options, **hyper),
        range(4),
    )
    assert not torch.equal(model[0].weight, uncorrected[0].weight)


def test_beside_a_group_with_another_correction(backend: Backend) -> None:
    """Whose first step goes without dampening, as that of the others."""
    results = []
    for first, second in (("auto", "unnormalized"), ("layer", "unnormalized")):
        model = Network()
        groups: list[dict[str, Any]] = [
            {"params": model[0].parameters(), "correction": first},
            {"params": model[2].parameters(), "correction": second, "dampening": 0.3},
        ]
        optimizer = SparseOpt(
            groups,
            lr=0.1,
            momentum=0.9,
            dampening=0.5,
            masks=Masks(model),
            feeding_norm={"0.weight": model[0].weight},
            backend=backend.name,
        )
        run(model, optimizer, range(4))
        results.append(model)
    assert_same(*results)


@pytest.mark.parametrize("before", ["layer", "none", "auto"])
@pytest.mark.parametrize("after", ["layer", "none", "auto"])
def test_written_into_a_group_later(backend: Backend, before: str, after: str) -> None:
    model, twin = Network(), Network()
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    optimizer, other = automatic(model, backend, **options), by_hand(twin, backend, **options)
    for t, correction in enumerate((before, after)):
        optimizer.param_groups[0]["correction"] = correction
        for group, resolved in zip(other.param_groups, ("layer", "none"), strict=True):
            group["correction"] = resolved if correction == "auto" else correction
        run(model, optimizer, range(2 * t, 2 * t + 2))
        run(twin, other, range(2 * t, 2 * t + 2))
        assert_same(model, twin)


def test_a_weight_without_a_mask(backend: Backend) -> None:
    """Nothing is corrected, whatever the correction; a mask that comes later is seen."""
    model, twin = Network(), Network()
    masks = {model[0].weight: model[0].weight_mask}
    optimizer = SparseOpt(
        model.parameters(), lr=0.1, masks=masks, correction="auto", feeding_norm={}, backend=backend.name
    )
    twin_masks = {twin[0].weight: twin[0].weight_mask}
    other = SparseOpt(twin.parameters(), lr=0.1, masks=twin_masks, correction="none", backend=backend.name)
    run(model, optimizer, range(2))
    run(twin, other, range(2))
    masks[model[2].weight], twin_masks[twin[2].weight] = model[2].weight_mask, twin[2].weight_mask
    run(model, optimizer, range(2, 4))
    run(twin, other, range(2, 4))
    assert_same(model, twin)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(backend: Backend, how: str) -> None:
    model, twin = Network(), Network()
    optimizer = automatic(model, backend, lr=0.1, momentum=0.9)
    run(model, optimizer, range(2))
    bundle = (model, optimizer)
    model, optimizer = copy.deepcopy(bundle) if how == "deepcopy" else pickle.loads(pickle.dumps(bundle))
    run(model, optimizer, range(2, 4))
    other = by_hand(twin, backend, lr=0.1, momentum=0.9)
    run(twin, other, range(4))
    assert_same(model, twin)


def test_save_and_load(backend: Backend) -> None:
    model, twin = Network(), Network()
    optimizer = automatic(model, backend, lr=0.1, momentum=0.9)
    run(model, optimizer, range(2))
    state = optimizer.state_dict()
    assert state["param_groups"][0]["correction"] == "auto"
    resumed = Network()
    resumed.load_state_dict(model.state_dict())
    other = automatic(resumed, backend, lr=5.0)
    other.load_state_dict(copy.deepcopy(state))
    run(model, optimizer, range(2, 4))
    run(resumed, other, range(2, 4))
    assert_same(model, resumed)
    assert_same_state(optimizer, other)
    run(twin, by_hand(twin, backend, lr=0.1, momentum=0.9), range(4))
    assert_same(model, twin)


def test_a_checkpoint_of_sgd(backend: Backend) -> None:
    """It has no word for the correction, which stays."""
    model, twin = Network(), Network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    run(model, sgd, range(2))
    twin.load_state_dict(model.state_dict())
    optimizer = automatic(model, backend)
    optimizer.load_state_dict(sgd.state_dict())
    other = by_hand(twin, backend, lr=0.1, momentum=0.9)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        other.state[q]["momentum_buffer"] = optimizer.state[p]["momentum_buffer"].clone()
    run(model, optimizer, range(2, 4))
    run(twin, other, range(2, 4))
    assert_same(model, twin)


def test_a_group_added_later(backend: Backend) -> None:
    model, twin = Network(), Network()
    masks = {model[2].weight: model[2].weight_mask}
    optimizer = SparseOpt(
        model[2].parameters(),
        lr=0.1,
        masks=masks,
        correction="auto",
        feeding_norm={"0.weight": model[0].weight, "2.weight": model[2].weight},
        backend=backend.name,
    )
    masks[model[0].weight] = model[0].weight_mask
    optimizer.add_param_group({"params": model[0].parameters()})
    run(model, optimizer, range(3))
    run(twin, SparseOpt(twin.parameters(), lr=0.1, masks=Masks(twin), backend=backend.name), range(3))
    assert_same(model, twin)


def test_without_feeding_norm() -> None:
    """Of all groups, of one, of one that comes later; and nothing is there then."""
    a, b = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=UNKNOWN):
        SparseOpt([a], correction="auto")
    with pytest.raises(ValueError, match=UNKNOWN):
        SparseOpt([{"params": [a], "correction": "auto"}])
    optimizer = SparseOpt([a])
    with pytest.raises(ValueError, match=UNKNOWN):
        optimizer.add_param_group({"params": [b], "correction": "auto"})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("how", ["written", "loaded"])
def test_without_feeding_norm_in_a_step(backend: Backend, how: str) -> None:
    model = Network()
    optimizer = SparseOpt(model.parameters(), lr=0.1, masks=Masks(model), backend=backend.name)
    run(model, optimizer, range(1))
    if how == "written":
        optimizer.param_groups[0]["correction"] = "auto"
    else:
        other = Network()
        optimizer.load_state_dict(automatic(other, backend).state_dict())
    former = copy.deepcopy(model)
    with pytest.raises(ValueError, match=UNKNOWN):
        run(model, optimizer, range(1, 2))
    assert_same(model, former)


def test_a_feeding_norm_that_is_refused() -> None:
    weight = Parameter(torch.ones(3, 4))
    with pytest.raises(TypeError, match=words("feeding_norm is a list", "mapping from name to parameter")):
        SparseOpt([weight], feeding_norm=[weight])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=words("feeding_norm['fc'] is a Linear", "must be a parameter")):
        SparseOpt([weight], feeding_norm={"fc": nn.Linear(4, 3)})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=words("feeding_norm has none", "another model or a copy")):
        SparseOpt([weight], feeding_norm={"w": copy.deepcopy(weight)})
    with pytest.raises(ValueError, match="a parameter group has 'feeding_norm'"):
        SparseOpt([{"params": [weight], "feeding_norm": {}}])
