"""SET, RigL and GMP as they are printed, and the warning of a clock that starts again."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from masked_model import NAMES, make_model
from torch import nn

from sparseopt_kernels import GMP, SET, RigL, sparsify


def layer(size: int = 8) -> dict[nn.Parameter, torch.Tensor]:
    parameter = nn.Parameter(torch.arange(1.0, size + 1))
    parameter.grad = torch.ones(size)
    return {parameter: torch.arange(size) % 2 == 0}


class TestRepr:
    @pytest.mark.parametrize("cls", [SET, RigL])
    def test_of_set_and_rigl(self, cls: type[SET | RigL]) -> None:
        name = cls.__name__
        dst = cls(layer(), 0.3, 100, stop_at=250)
        assert (
            repr(dst)
            == f"{name}(drop_fraction=0.3, update_every=100, stop_at=250.0, step=0, next_update=100)"
        )
        for step, due in ((1, "100"), (99, "100"), (100, "200"), (199, "200"), (200, "none"), (260, "none")):
            while dst._step < step:
                dst.step()
            assert repr(dst).endswith(f"stop_at=250.0, step={step}, next_update={due})")

    def test_of_a_postponed_update(self) -> None:
        masks = layer()
        dst = RigL(masks, 0.3, 3, stop_at=250, min_fan_in=0)
        next(iter(masks)).grad[0] = math.nan  # type: ignore[index]
        for _ in range(3):
            dst.step()
        assert repr(dst).endswith("step=3, next_update=4)")
        dst = RigL(masks, 0.3, 3, stop_at=4)
        for _ in range(3):
            dst.step()
        assert repr(dst).endswith("step=3, next_update=none)")

    def test_of_min_fan_in(self) -> None:
        weight = nn.Parameter(torch.ones(2, 4))
        dst = SET({weight: torch.ones(2, 4).bool()}, stop_at=math.inf, min_fan_in=3)
        assert repr(dst) == (
            "SET(drop_fraction=0.3, update_every=100, stop_at=inf, step=0, next_update=100, min_fan_in=3)"
        )

    def test_of_gmp(self) -> None:
        dst = GMP(layer(), 0.75, 10, start_at=5, stop_at=30)
        assert repr(dst) == "GMP(sparsity=0.75, update_every=10, stop_at=30.0, step=0, next_update=15)"
        for _ in range(25):
            dst.step()
        assert repr(dst).endswith("step=25, next_update=30)")


class TestExplorationOfEachLayer:
    def test_names_are_those_of_the_model(self) -> None:
        masks = sparsify(make_model(), 0.5, "uniform")
        dst = SET(masks, stop_at=900)
        rates = dst.exploration_rates()
        assert list(rates) == NAMES
        assert all(rate == pytest.approx(0.5, abs=1e-2) for rate in rates.values())
        sizes = {name: p.numel() for name, p in masks.named().items()}
        total = sum(rates[name] * sizes[name] for name in NAMES)
        assert dst.exploration_rate() == pytest.approx(total / sum(sizes.values()))

    def test_by_hand(self) -> None:
        masks = {**layer(), **layer(4)}
        dst = RigL(masks, 0.5, 1, stop_at=math.inf)
        first, second = masks
        first.grad = torch.tensor([0.0, 9, 0, 8, 0, 0, 0, 0])  # 1 and 3 drop, places 1 and 3 grow
        second.grad = torch.tensor([9.0, 0, 0, 0])  # 1 drops and grows again
        dst.step()
        assert dst.exploration_rates() == {"parameter 0": 0.75, "parameter 1": 0.5}
        assert dst.exploration_rate() == 8 / 12

    def test_of_no_weights(self) -> None:
        empty = nn.Parameter(torch.ones(0, 4))
        dst = SET({empty: torch.ones(0, 4).bool()}, stop_at=900)
        assert dst.exploration_rates() == {"parameter 0": 0.0}


class TestMasksOfACheckpoint:
    """``model.load_state_dict`` without ``dst.load_state_dict``."""

    def make(self, cls: type[Any], seed: int) -> tuple[nn.ModuleDict, Any]:
        model = make_model()
        masks = sparsify(model, 0.5, seed=seed)
        return model, GMP(masks, 0.9, stop_at=900) if cls is GMP else cls(masks, stop_at=900)

    @pytest.mark.parametrize("cls", [SET, RigL, GMP])
    def test_a_forgotten_state_is_warned_of_once(self, cls: type[Any]) -> None:
        trained, _ = self.make(cls, 0)
        model, dst = self.make(cls, 1)
        model.load_state_dict(trained.state_dict())
        message = rf"masks have changed since {cls.__name__} was made.* \(dst\.load_state_dict\)"
        with pytest.warns(UserWarning, match=message) as record:
            dst.step()
        assert record[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            dst.step()

    @pytest.mark.parametrize("cls", [SET, RigL, GMP])
    @pytest.mark.parametrize("model_first", [True, False])
    def test_a_whole_resume_is_silent(self, cls: type[Any], model_first: bool) -> None:
        trained, former = self.make(cls, 0)
        model, dst = self.make(cls, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for load_model in (model_first, not model_first):
                if load_model:
                    model.load_state_dict(trained.state_dict())
                else:
                    dst.load_state_dict(former.state_dict())
            dst.step()

    def test_the_same_masks_are_no_news(self) -> None:
        trained, _ = self.make(SET, 0)
        model, dst = self.make(SET, 0)
        model.load_state_dict(trained.state_dict())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            dst.step()
