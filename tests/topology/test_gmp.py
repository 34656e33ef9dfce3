"""Gradual magnitude pruning: the cubic schedule, what is pruned, where it ends."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from by_hand import bits, parameter_with
from method_seeds import updated_by_step
from torch import Tensor, nn

import sparseopt_kernels as sk
from sparseopt_kernels import native_library
from sparseopt_kernels.masks.mapping import Masks
from sparseopt_kernels.neurons import fan_in
from sparseopt_kernels.topology.gmp import GMP, cubic_density
from sparseopt_kernels.topology.sparsify import sparsify

# Their magnitudes are 8, 1, 7, 2, 6, 3, 5, 4.
VALUES = [8.0, -1, 7, 2, -6, 3, 5, 4]


class TestByHand:
    """Eight weights."""

    def make(self, mask: str = "1111 1111", sparsity: float = 0.75, **options: Any) -> GMP:
        self.mask = bits(mask)
        self.parameter = parameter_with([v * bool(m) for v, m in zip(VALUES, self.mask, strict=True)])
        return GMP({self.parameter: self.mask}, sparsity, **{"update_every": 1, "stop_at": 4, **options})

    @pytest.mark.parametrize(
        ("progress", "sparsity"),
        # From 0.2 to 0.92: s_f - 0.72 (1 - progress)^3.
        [(-1, 0.2), (0, 0.2), (0.25, 0.61625), (0.5, 0.83), (0.75, 0.90875), (1, 0.92), (2, 0.92)],
    )
    def test_the_cubic_schedule(self, progress: float, sparsity: float) -> None:
        assert 1 - cubic_density(0.8, 0.08, progress) == pytest.approx(sparsity, abs=1e-15)

    def test_from_dense(self) -> None:
        # s_t = 0.75 (1 - (1 - t / 4)^3): 0.4336, 0.6563, 0.7383, 0.75 of 8 are 3.5, 5.3, 5.9 and 6.
        dst = self.make()
        expected = ["1010 1011", "1010 1000", "1010 0000", "1010 0000", "1010 0000"]
        for step, mask in enumerate(expected):
            assert updated_by_step(dst) == (step < 3)
            assert self.mask.tolist() == bits(mask).tolist()
            assert self.parameter.tolist() == [v * m for v, m in zip(VALUES, self.mask.tolist(), strict=True)]

    def test_from_the_sparsity_that_is_there(self) -> None:
        # From 0.25 to 0.75: 0.539, 0.6875, 0.742 and 0.75 of 8 are 4.3, 5.5, 5.9 and 6.
        dst = self.make("0111 1101")
        counts = []
        for _ in range(4):
            dst.step()
            counts.append(int(self.mask.sum()))
        assert counts == [4, 2, 2, 2]
        assert self.mask.tolist() == bits("0010 1000").tolist()

    def test_pruned_weights_never_return(self) -> None:
        dst = self.make()
        dst.step()
        with torch.no_grad():
            self.parameter.copy_(torch.arange(8.0) - 20)  # large where there is no weight any more
        pruned = ~self.mask
        while dst._step < 6:
            dst.step()
            assert not self.mask[pruned].any()

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"stop_at": 9, "update_every": 4}, [4, 8, 9]),
            ({"stop_at": 8.5, "update_every": 4}, [4, 8, 9]),
            ({"stop_at": 8, "update_every": 4}, [4, 8]),
            ({"stop_at": 3, "update_every": 100}, [3]),
            ({"stop_at": 9, "update_every": 3, "start_at": 2}, [5, 8, 9]),
        ],
    )
    def test_when_updates_happen(self, options: dict[str, Any], expected: list[int]) -> None:
        # So many weights that every update drops some.
        parameter = nn.Parameter(torch.randn(40000))
        mask = torch.ones(40000, dtype=torch.bool)
        dst = GMP({parameter: mask}, 0.9, **options)
        seen = [repr(dst).rpartition("next_update=")[2][:-1]]
        updates = []
        for step in range(1, 14):
            if updated_by_step(dst):
                updates.append(step)
                seen.append(repr(dst).rpartition("next_update=")[2][:-1])
        assert updates == expected
        assert seen == [*map(str, expected), "none"]
        assert int(mask.sum()) == 4000

    def test_at_least_one_weight_is_left(self) -> None:
        dst = self.make(sparsity=0.99, stop_at=1)
        dst.step()
        assert self.mask.tolist() == bits("1000 0000").tolist()

    def test_gradients_do_not_matter(self) -> None:
        dst = self.make()
        self.parameter.grad = torch.full((8,), math.nan)
        assert updated_by_step(dst) is True
        assert self.parameter.grad.isnan().all()

    def test_every_neuron_keeps_its_inputs(self) -> None:
        parameter = parameter_with([[8.0, 7, 6, 5], [4, 3, 2, 1]])
        mask = torch.ones(2, 4, dtype=torch.bool)
        dst = GMP({parameter: mask}, 0.75, 1, stop_at=1, min_fan_in=1)
        dst.step()
        assert mask.tolist() == [[True, False, False, False], [True, False, False, False]]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_a_float_mask_stays_float(self, dtype: torch.dtype) -> None:
        parameter, mask = parameter_with(VALUES), torch.ones(8, dtype=dtype)
        dst = GMP({parameter: mask}, 0.75, 1, stop_at=1)
        version = mask._version
        dst.step()
        assert mask.dtype == dtype
        assert mask.tolist() == [1, 0, 1, 0, 0, 0, 0, 0]
        assert mask._version > version

    def test_a_mask_of_two_parameters_is_pruned_once(self) -> None:
        mask = bits("1111 1111")
        dst = GMP({parameter_with(VALUES): mask, parameter_with(VALUES[::-1]): mask}, 0.5, 1, stop_at=1)
        dst.step()
        assert int(mask.sum()) == 4


class TestLayers:
    def model(self) -> tuple[nn.Sequential, Masks]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(100, 30), nn.ConvTranspose2d(8, 6, 3), nn.Linear(30, 7))
        return model, sparsify(model, 0.0)

    def counts(self, masks: Masks) -> list[int]:
        return [int(mask.sum()) for mask in masks.values()]

    def test_uniform(self) -> None:
        _, masks = self.model()
        dst = sk.GMP(masks, 0.9, 2, stop_at=5)
        for _ in range(5):
            dst.step()
        assert self.counts(masks) == [300, 43, 21]
        for parameter, mask in masks.items():
            assert not parameter[~mask].any()
            # The largest are left.
            assert parameter[mask].abs().min() > 0

    def test_erk(self) -> None:
        _, masks = self.model()
        dst = GMP(masks, 0.9, 2, stop_at=5, distribution="erk")
        for _ in range(5):
            dst.step()
        densities = sk.layer_densities({n: p.shape for n, p in masks.named().items()}, 0.9)
        expected = [round(densities[name] * p.numel()) for name, p in masks.named().items()]
        assert self.counts(masks) == expected
        assert expected[0] < 300 < 3000

    def test_a_sparsity_of_each_layer(self) -> None:
        _, masks = self.model()
        dst = GMP(masks, {"0": 0.5, "2.weight": 0.9, "*": 0.75}, 2, stop_at=2)
        dst.step()
        dst.step()
        assert self.counts(masks) == [1500, 108, 21]

    def test_what_no_pattern_matches_stays(self) -> None:
        _, masks = self.model()
        dst = GMP(masks, {"[01]": 0.5}, 2, stop_at=2)
        dst.step()
        dst.step()
        assert self.counts(masks) == [1500, 216, 210]

    def test_the_library_prunes_as_pytorch_does(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def run(min_fan_in: int) -> list[Tensor]:
            model, masks = self.model()
            dst = GMP(masks, 0.8, 2, stop_at=9, min_fan_in=min_fan_in)
            for _ in range(10):
                dst.step()
                with torch.no_grad():
                    for parameter, mask in masks.items():
                        parameter.add_(0.1 * parameter.abs().roll(1, 0) * mask)
            return [*model.state_dict().values()]

        for min_fan_in in (0, 3):
            with_library = run(min_fan_in)
            with monkeypatch.context() as patch:
                patch.setattr(native_library, "MISSING", "taken away for a test")
                assert all(torch.equal(a, b) for a, b in zip(with_library, run(min_fan_in), strict=True))

    def test_neurons_of_a_transposed_convolution_keep_their_inputs(self) -> None:
        _, masks = self.model()
        weight = masks.named()["1.weight"]
        with torch.no_grad():
            weight[:, 2] *= 1e-3
        dst = GMP(masks, 0.9, 1, stop_at=1, min_fan_in=3)
        dst.step()
        assert int(fan_in(masks[weight], masks.neurons(weight))[2]) == 3

    @pytest.mark.parametrize("stop", [1, 4, 5, 9])
    def test_a_resume_is_bit_identical(self, stop: int) -> None:
        def go_on(model: nn.Module, dst: GMP, steps: range) -> None:
            for step in steps:
                dst.step()
                with torch.no_grad():
                    for parameter, mask in dst.masks.items():
                        noise = torch.Generator().manual_seed(step)
                        parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise) * mask)

        whole, masks = self.model()
        go_on(whole, GMP(masks, 0.8, 3, start_at=1, stop_at=9, min_fan_in=1), range(12))
        model, masks = self.model()
        dst = GMP(masks, 0.8, 3, start_at=1, stop_at=9, min_fan_in=1)
        go_on(model, dst, range(stop))
        file = io.BytesIO()
        torch.save([model.state_dict(), dst.state_dict()], file)
        file.seek(0)
        model_state, dst_state = torch.load(file, weights_only=True)
        model, masks = self.model()
        model.load_state_dict(model_state)
        dst = GMP(masks, {"*": 0.9}, 2, stop_at=20)
        dst.load_state_dict(dst_state)
        go_on(model, dst, range(stop, 12))
        assert self.counts(masks) == [600, 86, 42]
        for name, value in whole.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name

    def test_the_wrong_state_is_refused(self) -> None:
        _, masks = self.model()
        dst = GMP(masks, 0.8, stop_at=9)
        with pytest.raises(ValueError, match="state_dict has keys"):
            dst.load_state_dict(sk.SET(masks, stop_at=900).state_dict())

    def test_a_state_of_other_layers_changes_nothing(self) -> None:
        _, masks = self.model()
        dst = GMP(masks, {"0": 0.9, "1": 0.9}, stop_at=9)
        before = dst.state_dict()
        state = {**before, "sparsity": {"nowhere": 0.5}, "stop_at": 7.0}
        with pytest.raises(ValueError, match="nowhere"):
            dst.load_state_dict(state)
        assert dst.state_dict()["sparsity"] == {"0": 0.9, "1": 0.9}
        assert dst.stop_at == 9.0
        dst.step()

    def test_exploration_is_that_of_the_start(self) -> None:
        model, _ = self.model()
        for layer in model:
            del layer._buffers["weight_mask"]
        masks = sparsify(model, 0.5, "uniform")
        dst = GMP(masks, 0.9, 1, stop_at=2)
        dst.step()
        dst.step()
        assert dst.exploration_rate() == 0.5
        assert dst.exploration_rates() == {"0.weight": 0.5, "1.weight": 0.5, "2.weight": 0.5}


class TestBadInput:
    def make(self, mask: str = "1111 1111", sparsity: Any = 0.5, **options: Any) -> GMP:
        return GMP({parameter_with(VALUES): bits(mask)}, sparsity, **{"stop_at": 10, **options})

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"sparsity": 1.0}, r"sparsity is 1\.0, it must be in \[0, 1\)"),
            ({"sparsity": math.nan}, r"sparsity is nan, it must be in \[0, 1\)"),
            ({"sparsity": {"*": 1.5}}, r"sparsity of '\*' is 1\.5, it must be in \[0, 1\)"),
            ({"sparsity": {"fc": 0.5}}, "sparsity has 'fc', which matches no maskable weight"),
            (
                {"sparsity": {"*": 0.5}, "distribution": "erk"},
                "distribution is 'erk', but sparsity is a mapping",
            ),
            ({"distribution": "even"}, "distribution is 'even', it must be one of"),
            ({"stop_at": math.inf}, "stop_at is inf, it must be finite and over start_at"),
            ({"stop_at": 5, "start_at": 5}, r"stop_at is 5, it must be finite and over start_at \(5\)"),
            ({"start_at": -1}, "start_at is -1, it must be an integer of at least 0"),
            ({"start_at": 1.5}, r"start_at is 1\.5, it must be an integer of at least 0"),
            ({"update_every": 0}, "update_every is 0, it must be an integer of at least 1"),
            ({"mask": "1110 0000"}, "'parameter 0' has 3 active weights and would have 4 at the end"),
            ({"min_fan_in": 1}, "8 neurons of 'parameter 0' need 8 active weights, it has 4"),
        ],
    )
    def test_it_is_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            self.make(**options)
