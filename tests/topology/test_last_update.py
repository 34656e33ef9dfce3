"""What an update did, by layer: numbers by hand, the table, and the warning of concentrated growth."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from by_hand import bits, parameter_with
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from sparseopt_kernels.masks.mapping import Masks
from sparseopt_kernels.neurons import Neurons
from sparseopt_kernels.optimizer import SparseOpt
from sparseopt_kernels.topology import update_plan
from sparseopt_kernels.topology.gmp import GMP
from sparseopt_kernels.topology.layer_update import LayerUpdate, compare_masks
from sparseopt_kernels.topology.rigl import RigL
from sparseopt_kernels.topology.set import SET
from sparseopt_kernels.topology.sparsify import sparsify


@pytest.fixture(params=["native", "PyTorch"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "PyTorch":
        monkeypatch.setattr(update_plan, "supports", lambda layers: False)


def layer() -> tuple[Parameter, Tensor]:
    """Four neurons of four inputs. Of six weights, three drop: neuron 0 loses its only one, neuron 3 has
    none and gets two, neuron 1 loses two and gets one."""
    weight = parameter_with([[1.0, 0, 0, 0], [2, 3, 9, 0], [8, 7, 0, 0], [0, 0, 0, 0]])
    weight.grad = torch.tensor([[0.0, 0, 0, 0], [0, 0, 0, 5], [0, 0, 1, 1], [6, 6, 0, 0]])
    return weight, weight.detach() != 0


@pytest.mark.usefixtures("_way")
def test_rigl_by_hand() -> None:
    weight, mask = layer()
    dst = RigL({weight: mask}, 0.5, 1, stop_at=math.inf, skip_step=False)
    assert dst.last_update == {}
    dst.step()
    assert mask.flatten().tolist() == bits("0000 0011 1100 1100").tolist()
    (update,) = dst.last_update.values()
    assert update == LayerUpdate(dropped=3, grown=3, died=1, revived=1, most_grown=2)
    assert update.changed
    assert update.largest_share == pytest.approx(2 / 3)


@pytest.mark.usefixtures("_way")
def test_what_grows_again_does_not_count() -> None:
    weight, mask = layer()
    weight.grad = torch.where(mask, 9.0, 0.0)
    dst = RigL({weight: mask}, 0.5, 1, stop_at=math.inf, skip_step=False)
    dst.step()
    assert dst.last_update == {"parameter 0": LayerUpdate()}
    assert not dst.updated


@pytest.mark.usefixtures("_way")
def test_gmp_drops_alone() -> None:
    weight, mask = layer()
    dst = GMP({weight: mask}, 1 - 3 / 16, 1, stop_at=1)
    dst.step()
    assert dst.last_update == {"parameter 0": LayerUpdate(dropped=3, died=1)}


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("cls", [SET, RigL])
@pytest.mark.parametrize("groups", [1, 3])
def test_neurons_of_every_kind_of_layer(cls: type, groups: int) -> None:
    """In agreement with masks before and after, neuron by neuron."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.ConvTranspose2d(6, 2 * groups, 3, groups=groups), nn.Conv2d(2 * groups, 5, 2), nn.Linear(9, 7)
    )
    masks = sparsify(model, 0.8, distribution="uniform", seed=1)
    before = {name: masks[p].clone() for name, p in masks.named().items()}
    for p in masks:
        p.grad = torch.randn_like(p)
    dst = cls(masks, 0.6, 2, stop_at=math.inf)
    dst.step()
    dst.step()
    for name, p in masks.named().items():
        assert dst.last_update[name] == by_neuron(before[name], masks[p], masks.neurons(p))
        assert dst.last_update[name].dropped == dst.last_update[name].grown > 0


def by_neuron(before: Tensor, after: Tensor, neurons: Neurons) -> LayerUpdate:
    groups, segments, per_group, length = neurons.grid(before.shape)
    old, new = (t.reshape(groups, segments, per_group, length) for t in (before, after))
    counts = []
    for g in range(groups):
        for j in range(per_group):
            a, b = old[g, :, j].flatten().tolist(), new[g, :, j].flatten().tolist()
            lost = sum(x and not y for x, y in zip(a, b, strict=True))
            got = sum(y and not x for x, y in zip(a, b, strict=True))
            counts.append((lost, got, any(a) and not any(b), any(b) and not any(a)))
    dropped, grown, died, revived = (sum(column) for column in zip(*counts, strict=True))
    return LayerUpdate(dropped, grown, died, revived, max(count[1] for count in counts))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), shape=st.sampled_from([(1,), (5,), (3, 4), (4, 2, 3), (0, 3), (3, 0)]))
def test_masks_compared(seed: int, shape: tuple[int, ...]) -> None:
    random = torch.Generator().manual_seed(seed)
    before, after = (torch.rand(shape, generator=random) < 0.3 for _ in range(2))
    expected = by_neuron(before, after, Neurons()) if before.numel() else LayerUpdate()
    assert compare_masks(before, after, Neurons()) == expected


def test_an_update_that_is_not_made_leaves_it() -> None:
    weight, mask = layer()
    dst = RigL({weight: mask}, 0.5, 2, stop_at=math.inf)
    dst.step()
    dst.step()
    made = dst.last_update
    dst.step()
    assert dst.last_update == made
    weight.grad[0, 0] = math.nan  # type: ignore[index]
    dst.step()
    assert dst.last_update == made
    assert copy.deepcopy(dst).last_update == made
    assert "last_update" not in dst.state_dict()


class TestSummary:
    def setup_method(self) -> None:
        torch.manual_seed(0)
        self.model: Any = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 3))
        weight, mask = layer()
        self.model[0].weight = nn.Parameter(weight.detach())
        self.model[0].register_buffer("weight_mask", mask)
        self.model[0].weight.grad = weight.grad
        self.dst = RigL(Masks(self.model), 0.5, 2, stop_at=math.inf)
        self.dst.step()

    def test_records(self) -> None:
        (before,) = self.dst.summary()
        assert before["dead_neurons"] == 1
        assert before["grown"] == 0
        self.dst.step()
        assert self.dst.summary() == [
            {
                "name": "0.weight",
                "active": 6,
                "exploration_rate": 9 / 16,
                "dead_neurons": 1,
                "neurons": 4,
                "dropped": 3,
                "grown": 3,
                "died": 1,
                "revived": 1,
                "largest_share": 2 / 3,
            }
        ]

    def test_the_table(self) -> None:
        self.dst.step()
        first, header, rule, line = str(self.dst).splitlines()
        assert first == repr(self.dst)
        assert header.split() == [
            *("parameter", "active", "explored", "dead", "neurons"),
            *("dropped", "grown", "died", "revived", "to", "one"),
        ]
        assert set(rule) == {"-"}
        assert line.split() == ["0.weight", "6", "0.5625", "1", "of", "4", "3", "3", "1", "1", "67%"]

    def test_loading_a_state_forgets_the_update(self) -> None:
        state = self.dst.state_dict()
        self.dst.step()
        self.dst.load_state_dict(state)
        assert self.dst.last_update == {}

    def test_died_and_revived_are_told_apart(self) -> None:
        weight = self.model[0].weight
        weight.grad[3] = 0.0  # neuron 3 gets nothing, neuron 2 all
        weight.grad[2, 2:] = 9.0
        self.dst.step()
        (record,) = self.dst.summary()
        assert (record["died"], record["revived"], record["dead_neurons"]) == (1, 0, 2)
        assert str(self.dst).splitlines()[3].split()[-3:-1] == ["1", "0"]

    def test_dead_share(self) -> None:
        masks = Masks(self.model)
        assert masks.dead_share() == 1 / 4
        self.model[0].weight_mask[:] = torch.eye(4, dtype=torch.bool)
        assert masks.dead_share() == 0.0

    def test_neurons_of_a_transposed_convolution(self) -> None:
        model: Any = nn.Sequential(nn.ConvTranspose1d(3, 2, 2))
        mask = torch.zeros(3, 2, 2, dtype=torch.bool)
        mask[:, 0] = True
        model[0].register_buffer("weight_mask", mask)
        (record,) = RigL(Masks(model), stop_at=1000).summary()
        assert (record["neurons"], record["dead_neurons"]) == (2, 1)

    def test_of_all_kinds(self) -> None:
        for cls in (SET, GMP):
            options: dict[str, Any] = {"sparsity": 0.9} if cls is GMP else {}
            dst = cls(dict(self.dst.masks), **options, stop_at=1000)
            assert [record["name"] for record in dst.summary()] == ["parameter 0"]


class TestConcentratedGrowth:
    """One neuron of many gets most of what grows."""

    def dst(self, grown: int, to_one: int, neurons: int = 60, **options: Any) -> RigL:
        """The next update grows that many weights, so many of them in neuron 0."""
        columns = 40
        mask = torch.zeros(neurons, columns, dtype=torch.bool)
        mask[1:, :4] = True
        active = int(mask.sum())
        weight = nn.Parameter(mask.float())
        weight.grad = torch.zeros_like(weight)
        weight.grad[0, :to_one] = 2.0
        others = torch.arange(grown - to_one)
        weight.grad[1 + others % (neurons - 1), 4 + others // (neurons - 1)] = 1.0
        self.masks = {weight: mask}
        settings: dict[str, Any] = {"update_every": 1, "stop_at": math.inf, "skip_step": False, **options}
        return RigL({**self.masks}, (grown + 0.5) / active, drop_schedule=lambda t, end: 1.0, **settings)

    def warnings_of(self, dst: RigL) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            dst.step()
        return [str(w.message) for w in caught if "weights that grew" in str(w.message)]

    def test_what_it_says(self) -> None:
        dst = self.dst(grown=50, to_one=30)
        (message,) = self.warnings_of(dst)
        assert dst.last_update["parameter 0"].most_grown == 30
        assert "one neuron of 'parameter 0' got 30 of the 50 weights that grew" in message
        assert message.index("SparseOpt(max_grad_norm=1)") < message.index("update_every")

    @pytest.mark.parametrize("limits", [(None, 1.0), (5.0, None)], ids=["of other parameters", "of its own"])
    def test_a_limit_is_not_advised_where_there_is_one(
        self, limits: tuple[float | None, float | None]
    ) -> None:
        dst, other = self.dst(grown=50, to_one=30), nn.Parameter(torch.zeros(2))
        groups: list[dict[str, Any]] = [
            {"params": params, "max_grad_norm": limit}
            for params, limit in zip(([*self.masks], [other]), limits, strict=True)
        ]
        opt = SparseOpt(groups, masks=self.masks)
        (message,) = self.warnings_of(dst)
        assert ("SparseOpt(max_grad_norm=1)" in message) == (opt.param_groups[0]["max_grad_norm"] is None)
        assert "et every neuron keep inputs (min_fan_in=1)" in message

    @pytest.mark.parametrize(
        ("grown", "to_one", "neurons", "warned"),
        [
            (50, 20, 60, True),
            (60, 20, 61, False),
            (40, 19, 60, False),
            (50, 20, 24, False),
            (48, 20, 24, True),
        ],
        ids=["over a third", "a third", "19 weights", "under ten times an even share", "ten times"],
    )
    def test_when(self, grown: int, to_one: int, neurons: int, warned: bool) -> None:
        dst = self.dst(grown, to_one, neurons)
        assert bool(self.warnings_of(dst)) == warned
        assert dst.last_update["parameter 0"][1::3] == (grown, to_one)

    def test_once_for_each_layer(self) -> None:
        first, second = self.dst(50, 30), self.dst(50, 30)
        both = RigL(
            {**first.masks, **second.masks},
            first.drop_fraction,
            1,
            stop_at=math.inf,
            skip_step=False,
            drop_schedule=lambda t, end: 1.0,
        )
        (message,) = self.warnings_of(both)
        assert "(and in 1 other layer)" in message
        for p, mask in both.masks.items():
            with torch.no_grad():
                mask[0] = False
                mask[1:, :4] = True
                mask[:, 4:] = False
                p.copy_(mask)
        assert self.warnings_of(both) == []
