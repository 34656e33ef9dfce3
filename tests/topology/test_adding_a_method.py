"""The page on adding a method: its methods do what they promise, and mistakes in them are found."""

from __future__ import annotations

import copy
import io
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from strict_mypy import strict_mypy
from torch import nn
from torch.nn import functional as F  # noqa: N812

from sparseopt_kernels import SparseOpt, native_library, sparsify
from sparseopt_kernels.masks.mapping import Masks
from sparseopt_kernels.topology.dynamic_sparse_training import DynamicSparseTraining

PAGE = Path(__file__).parents[2] / "docs" / "adding_a_method.md"
SRIGL, GRANET, GLOBAL = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def run(*blocks: str) -> Any:
    """Run blocks of the page, or mutants of them, in a module of their own, which pickle finds."""
    module = ModuleType("methods_of_the_page")
    sys.modules[module.__name__] = module
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), module.__dict__)
    return module


@pytest.fixture
def page() -> Iterator[Any]:
    yield run(SRIGL, GRANET, GLOBAL)
    del sys.modules["methods_of_the_page"]


def network() -> tuple[nn.Sequential, Masks]:
    """Layers of every kind, whose neurons do not all start with the same fan-in."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.ConvTranspose2d(8, 6, 2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 49, 10)),
    )
    return model, sparsify(model, 0.7, "uniform", seed=1, min_fan_in=1)


def backward(model: nn.Module, step: int) -> float:
    batch = torch.Generator().manual_seed(step % 5)
    inputs = torch.randn(16, 3, 8, 8, generator=batch)
    labels = torch.randint(10, (16,), generator=batch)
    model.zero_grad()
    loss = F.cross_entropy(model(inputs), labels)
    loss.backward()
    return float(loss.detach())


def fan_ins(masks: Masks) -> dict[str, list[int]]:
    return {name: masks.fan_in(p).tolist() for name, p in masks.named().items()}


def train(
    make: Callable[[Masks], Any], steps: int = 24
) -> tuple[list[dict[str, list[int]]], list[float], Any]:
    """Train; return the fan-ins after each update, the losses, and the method."""
    model, masks = network()
    dst = make(masks)
    opt = SparseOpt(model.parameters(), lr=0.1, momentum=0.9, masks=masks, max_grad_norm=1.0)
    updates, losses = [], []
    for step in range(1, steps + 1):
        losses.append(backward(model, step))
        dst.step()
        if dst.updated:
            updates.append(fan_ins(masks))
        opt.step()
        assert all(not p[~mask].any() for p, mask in masks.items())
    return updates, losses, dst


def has_constant_fan_in(counts: Mapping[str, list[int]], budgets: Mapping[str, int]) -> bool:
    """Tell if neurons of a layer have one fan-in or none, and that is the largest the budget allows."""
    return all(
        {k for k in own if k} == {budgets[name] // sum(k > 0 for k in own)} for name, own in counts.items()
    )


class TestSRigL:
    def budgets(self) -> dict[str, int]:
        _, masks = network()
        return {name: sum(own) for name, own in fan_ins(masks).items()}

    @pytest.mark.parametrize("library", [True, False], ids=["library", "PyTorch"])
    @pytest.mark.parametrize("min_salient", [0.0, 0.3, 0.5])
    def test_after_each_update_the_fan_in_is_constant(
        self, page: Any, min_salient: float, library: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if not library:
            monkeypatch.setattr(native_library, "MISSING", "taken away for a test")
        updates, losses, _ = train(
            lambda masks: page.SRigL(masks, 0.4, 3, stop_at=20, min_salient=min_salient), steps=60
        )
        assert len(updates) == 6
        assert all(has_constant_fan_in(counts, self.budgets()) for counts in updates)
        assert sum(losses[-5:]) < 0.6 * sum(losses[:5])

    def test_neurons_are_ablated_and_their_weights_shared(self, page: Any) -> None:
        mask = torch.ones(4, 6, dtype=torch.bool)
        mask[:, 3:] = False
        weight = nn.Parameter(torch.tensor([5.0, 4.0, 3.0, 0.1]).view(4, 1) * mask)
        weight.grad = torch.arange(24.0).view(4, 6) * ~mask
        weight.grad[3] = 0.0  # neuron 3 has the smallest weights and gradients
        dst = page.SRigL({weight: mask}, 0.25, 1, stop_at=math.inf, min_salient=0.5, skip_step=False)
        dst.step()
        assert mask.sum(dim=1).tolist() == [4, 4, 4, 0]
        # Three weights drop, neuron 3's. In each of the others, the largest gradient grows.
        expected = [[1, 1, 1, 0, 0, 1]] * 3 + [[0] * 6]
        assert mask.int().tolist() == expected
        assert dst.last_update["parameter 0"].died == 1
        dst.step()
        assert mask.sum(dim=1).tolist() == [4, 4, 4, 0]

    def test_an_ablated_neuron_may_come_back(self, page: Any) -> None:
        mask = torch.zeros(3, 4, dtype=torch.bool)
        mask[:2, :3] = True
        weight = nn.Parameter(torch.tensor([[1.0, 9, 9, 0], [2, 9, 9, 0], [0, 0, 0, 0]]))
        weight.grad = torch.zeros(3, 4)
        weight.grad[2] = 1.0
        dst = page.SRigL({weight: mask}, 0.34, 1, stop_at=math.inf, skip_step=False)
        dst.step()
        assert mask.sum(dim=1).tolist() == [2, 2, 2]
        assert not weight[2].any()

    def test_without_a_salient_neuron_none_is_ablated(self, page: Any) -> None:
        mask = torch.eye(3, 4, dtype=torch.bool)
        weight = nn.Parameter(torch.ones(3, 4) * mask)
        weight.grad = torch.ones(3, 4)
        page.SRigL({weight: mask}, 0.3, 1, stop_at=math.inf, min_salient=5.0, skip_step=False).step()
        assert mask.sum(dim=1).tolist() == [1, 1, 1]

    @pytest.mark.parametrize("stop", [5, 6, 7])
    def test_a_resume_is_bit_identical(self, page: Any, stop: int) -> None:
        """A stop just before, at and after an update, of masks that have lost neurons."""

        def make() -> tuple[nn.Sequential, Any, SparseOpt]:
            model, masks = network()
            dst = page.SRigL(masks, 0.4, 3, stop_at=20, min_salient=0.5)
            return model, dst, SparseOpt(model.parameters(), lr=0.1, momentum=0.9, masks=masks)

        def go_on(model: nn.Module, dst: Any, opt: SparseOpt, steps: range) -> None:
            for step in steps:
                backward(model, step)
                dst.step()
                opt.step()

        whole = make()
        go_on(*whole, range(14))
        first = make()
        go_on(*first, range(stop))
        file = io.BytesIO()
        torch.save([own.state_dict() for own in first], file)
        file.seek(0)
        resumed = make()
        resumed[1].budgets = [1, 1, 1]  # replaced by what was saved
        for own, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
            own.load_state_dict(state)
        if stop == 6:
            # As of RigL: the step that was left out is not saved. Here it was taken already.
            assert not resumed[1].skip_next
        go_on(*resumed, range(stop, 14))
        for name, value in whole[0].state_dict().items():
            assert torch.equal(resumed[0].state_dict()[name], value), name
        assert resumed[1].exploration_rates() == whole[1].exploration_rates()

    def test_the_step_after_an_update_is_left_out(self, page: Any) -> None:
        model, masks = network()
        dst = page.SRigL(masks, 0.4, 2, stop_at=20)
        opt = SparseOpt(model.parameters(), lr=0.1, momentum=0.9, masks=masks)
        for step in range(1, 5):
            backward(model, step)
            dst.step()
            before = [p.detach().clone() for p in model.parameters()]
            opt.step()
            moved = not all(map(torch.equal, before, (p.detach() for p in model.parameters())))
            assert moved == (step % 2 == 1)
            assert dst.skip_next == (step % 2 == 0)

    def test_an_overflow_postpones_it(self, page: Any) -> None:
        model, masks = network()
        dst = page.SRigL(masks, 0.4, 2, stop_at=20)
        backward(model, 0)
        good = [p.grad for p in masks]
        next(iter(masks)).grad = torch.full_like(good[0], math.inf)  # type: ignore[arg-type]
        dst.step()
        dst.step()
        assert not dst.updated
        next(iter(masks)).grad = good[0]
        dst.step()
        assert dst.updated

    def test_it_is_shown_and_copied(self, page: Any) -> None:
        _, masks = network()
        dst = page.SRigL(masks, update_every=3, stop_at=20)
        assert repr(dst) == "SRigL(drop_fraction=0.3, update_every=3, stop_at=20.0, step=0, next_update=3)"
        assert copy.deepcopy(dst).budgets == dst.budgets
        assert isinstance(dst, DynamicSparseTraining)

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("target - left, 0)", "1, 0)"),
            (".clamp_max(target)", ""),
            ("before - left", "before - before"),
            ("if not alive.any():", "if True:"),
            ("self.drop_fraction_at(step)", "0.0"),
            ("budget // max(1, int(alive.count_nonzero()))", "budget // before.numel()"),
        ],
        ids=["one-grows", "large-neurons-stay", "nothing-drops", "no-ablation", "no-update", "not-shared"],
    )
    def test_a_mistake_in_it_is_found(self, page: Any, old: str, new: str) -> None:
        assert SRIGL.count(old) == 1
        mutant = run(SRIGL.replace(old, new))
        with pytest.raises((AssertionError, ValueError)):
            self.check(mutant)
        self.check(page)

    def check(self, page: Any) -> None:
        self.test_neurons_are_ablated_and_their_weights_shared(page)
        updates, _, _ = train(lambda masks: page.SRigL(masks, 0.4, 3, stop_at=20))
        assert len(updates) == 6
        assert all(has_constant_fan_in(counts, self.budgets()) for counts in updates)


class TestGraNet:
    def test_it_prunes_on_the_schedule_and_regrows(self, page: Any) -> None:
        model, masks = network()
        start = {name: sum(own) for name, own in fan_ins(masks).items()}
        dst = page.GraNet(masks, 0.95, 0.5, 2, prune_until=8, stop_at=20)
        for step in range(1, 13):
            backward(model, step)
            dst.step()
            if step % 2:
                continue
            for name, p in masks.named().items():
                left = (1 - min(1.0, step / 8)) ** 3
                density = 0.05 + (start[name] / p.numel() - 0.05) * left
                assert sum(fan_ins(masks)[name]) == round(density * p.numel())
                update = dst.last_update[name]
                assert update.dropped >= update.grown
            assert any(update.grown > 0 for update in dst.last_update.values())

    def test_from_dense_masks(self, page: Any) -> None:
        model, masks = network()
        for mask in masks.values():
            mask.fill_(True)
        dst = page.GraNet(masks, 0.9, 0.5, 2, prune_until=4, stop_at=20)
        for step in range(1, 5):
            backward(model, step)
            dst.step()
        assert [int(mask.sum()) for mask in masks.values()] == [round(0.1 * p.numel()) for p in masks]


class TestGlobalRigL:
    @pytest.mark.parametrize("library", [True, False], ids=["library", "PyTorch"])
    def test_the_whole_network_has_as_many_weights_as_before(
        self, page: Any, library: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if not library:
            monkeypatch.setattr(native_library, "MISSING", "taken away for a test")
        model, masks = network()
        counts = {p: int(mask.sum()) for p, mask in masks.items()}
        dst = page.GlobalRigL(masks, 0.5, 1, stop_at=math.inf, skip_step=False)
        backward(model, 0)
        k = int(0.5 * sum(counts.values()))
        threshold = torch.cat([p[mask].abs() for p, mask in masks.items()]).kthvalue(k).values
        kept = {p: mask & (p.abs() > threshold) for p, mask in masks.items()}
        dst.step()
        assert masks.nnz() == sum(counts.values())
        assert any(int(mask.sum()) != counts[p] for p, mask in masks.items())
        assert all(bool(mask[kept[p]].all()) for p, mask in masks.items())

    def test_by_hand(self, page: Any) -> None:
        first = nn.Parameter(torch.tensor([1.0, 2, 0, 0]))
        second = nn.Parameter(torch.tensor([8.0, 9, 0, 0]))
        masks = {p: p.detach() != 0 for p in (first, second)}
        first.grad, second.grad = torch.tensor([0.0, 0, 1, 2]), torch.tensor([0.0, 0, 3, 4])
        page.GlobalRigL(masks, 0.5, 1, stop_at=math.inf, skip_step=False).step()
        assert [mask.int().tolist() for mask in masks.values()] == [[0, 0, 0, 0], [1, 1, 1, 1]]


@pytest.mark.slow
def test_mypy_accepts_the_page(tmp_path: Path) -> None:
    said = strict_mypy("\n\n".join([SRIGL, GRANET, GLOBAL]), tmp_path)
    assert said.startswith("Success"), said
    assert "no-untyped-def" in strict_mypy("def f(x): return x\n", tmp_path)
