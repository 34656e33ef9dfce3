"""``min_fan_in``: every neuron keeps that many inputs, and the number of active weights of a layer stays."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from by_hand import parameter_with
from method_seeds import updated_by_step
from torch import Tensor, nn

from sparseopt_kernels.masks.mapping import Masks
from sparseopt_kernels.neurons import Neurons, fan_in
from sparseopt_kernels.topology.rigl import RigL
from sparseopt_kernels.topology.seeding import generator
from sparseopt_kernels.topology.selection import drop_smallest, fill_neurons, missing_inputs, random_scores
from sparseopt_kernels.topology.set import SET

BOTH = pytest.mark.parametrize("cls", [SET, RigL])


def bits(text: str) -> Tensor:
    """``"1100 0011"``: two neurons with four inputs each."""
    rows = [[character == "1" for character in row] for row in text.split()]
    return torch.tensor(rows)


def scores(text: str) -> Tensor:
    return torch.tensor([[math.nan if c == "n" else float(c) for c in row] for row in text.split()])


@pytest.mark.parametrize(
    ("mask", "score", "k", "min_fan_in", "expected"),
    [
        # Without it, the second neuron loses its only input.
        ("1110 1000", "2340 1000", 2, 0, "0110 0000"),
        ("1110 1000", "2340 1000", 2, 1, "0010 1000"),
        # No more than three inputs can go, or two.
        ("1110 1110", "2340 1560", 4, 1, "0010 0010"),
        ("1110 1110", "2340 1560", 6, 1, "0010 0010"),
        ("1110 1110", "2340 1560", 6, 2, "0110 0110"),
        # A neuron that has fewer keeps them all.
        ("1110 1000", "2340 0000", 3, 2, "0110 1000"),
        # Of equal ones, the lower index stays; NaN goes first.
        ("1111 1000", "1111 0000", 3, 1, "1000 1000"),
        ("1111 1100", "n111 1n00", 3, 1, "0110 1000"),
        ("1100 1100", "nn00 1200", 1, 1, "1000 1100"),
    ],
)
def test_dropping_by_hand(mask: str, score: str, k: int, min_fan_in: int, expected: str) -> None:
    before = bits(mask)
    assert torch.equal(drop_smallest(before, scores(score), k, min_fan_in), bits(expected))
    assert torch.equal(before, bits(mask))


@pytest.mark.parametrize(
    ("kept", "score", "min_fan_in", "missing", "expected"),
    [
        ("1100 0000", "0000 1234", 0, 0, "1100 0000"),
        ("1100 0000", "0099 1234", 1, 1, "1100 0001"),
        ("1100 0000", "0099 1234", 3, 4, "1110 0111"),
        ("1000 0100", "0129 9000", 2, 2, "1001 1100"),
        # Of equal ones, the lower index; NaN last.
        ("0000 0001", "1111 0000", 2, 3, "1100 1001"),
        ("1000 1000", "0nn1 0nnn", 2, 2, "1001 1100"),
        ("1000 1000", "00n0 0000", 4, 6, "1111 1111"),
    ],
)
def test_filling_by_hand(kept: str, score: str, min_fan_in: int, missing: int, expected: str) -> None:
    before = bits(kept)
    assert missing_inputs(before, min_fan_in) == missing
    assert torch.equal(fill_neurons(before, scores(score), min_fan_in), bits(expected))
    assert torch.equal(before, bits(kept))


def test_neurons_of_a_transposed_convolution() -> None:
    # (in, out): neuron 0 is the first column, of which two weights are active; neuron 1 has one.
    mask, score = torch.tensor([[1, 0], [1, 0], [0, 1]]).bool(), torch.tensor([[2, 5], [3, 6], [4, 1]])
    columns = Neurons(dim=1)
    kept = drop_smallest(mask, score.float(), 2, 1, columns)
    assert kept.tolist() == [[False, False], [True, False], [False, True]]
    filled = fill_neurons(kept, score.float(), 2, columns)
    assert filled.tolist() == [[False, False], [True, True], [True, True]]


def test_in_groups() -> None:
    # (in, out / groups), two groups of one input each: four neurons with one input.
    mask = torch.tensor([[True, True], [True, True]])
    assert drop_smallest(mask, torch.ones(2, 2), 4, 1, Neurons(dim=1, groups=2)).all()


def test_random_scores_are_the_numbers_of_a_sequence() -> None:
    drawn = random_scores(torch.Size((2, 3)), generator(0, 0, 1))
    assert drawn.dtype == torch.int64
    assert torch.equal(drawn, random_scores(torch.Size((2, 3)), generator(0, 0, 1)))
    assert drawn.unique().numel() == 6


def test_what_set_fills_is_equally_likely() -> None:
    kept = torch.zeros(2, 6, dtype=torch.bool)
    counts = torch.zeros(2, 6)
    for update in range(2000):
        counts += fill_neurons(kept, random_scores(kept.shape, generator(0, 0, update)), 3)
    # 1000 expected for each; the standard deviation is 22.
    assert (counts - 1000).abs().max() < 5 * 22


class TestSteps:
    """Two neurons with four inputs."""

    def setup_method(self) -> None:
        self.parameter = parameter_with([[4.0, 3, 0, 0], [1, 0, 2, 0]], [[0.0, 0, 8, 9], [0, 1, 0, 2]])
        self.mask = bits("1100 1010")

    def make(self, cls: type[SET | RigL], **options: Any) -> SET | RigL:
        options = {"drop_fraction": 1.0, "update_every": 1, "stop_at": math.inf, **options}
        return cls({self.parameter: self.mask}, **options)

    @pytest.mark.parametrize(
        ("fraction", "min_fan_in", "expected"),
        [
            # 1 and 2 are the smallest weights, 8 and 9 the largest gradients.
            (0.5, 0, "1111 0000"),
            # 1 and 3 go: 2 and 4 are the largest of their neurons.
            (0.5, 1, "1011 0010"),
            (1.0, 1, "1011 0010"),
            (1.0, 2, "1100 1010"),
        ],
    )
    def test_rigl_by_hand(self, fraction: float, min_fan_in: int, expected: str) -> None:
        changed = updated_by_step(self.make(RigL, drop_fraction=fraction, min_fan_in=min_fan_in))
        assert torch.equal(self.mask, bits(expected))
        assert changed == (expected != "1100 1010")
        kept = self.mask & bits("1100 1010")
        assert torch.equal(self.parameter.detach(), torch.tensor([[4.0, 3, 0, 0], [1, 0, 2, 0]]) * kept)

    @pytest.mark.parametrize(("fraction", "expected"), [(0.0, "1110 0001"), (0.25, "1110 0001")])
    def test_a_dead_neuron_comes_to_life_first(self, fraction: float, expected: str) -> None:
        # One input is missing: the smallest weight goes for it, though the other neuron's gradient is larger.
        self.parameter = parameter_with([[4.0, 3, 2, 1], [0, 0, 0, 0]], [[0.0, 0, 0, 9], [0, 1, 0, 2]])
        self.mask = bits("1111 0000")
        assert updated_by_step(self.make(RigL, drop_fraction=fraction, min_fan_in=1))
        assert torch.equal(self.mask, bits(expected))

    def test_what_is_left_grows_as_usual(self) -> None:
        self.parameter = parameter_with([[4.0, 3, 2, 1], [0, 0, 0, 0]], [[0.0, 0, 0, 1], [0, 3, 0, 4]])
        self.mask = bits("1111 0000")
        assert updated_by_step(self.make(RigL, drop_fraction=0.5, min_fan_in=1))
        assert torch.equal(self.mask, bits("1100 0101"))

    @BOTH
    @pytest.mark.parametrize("min_fan_in", [1, 2])
    def test_every_neuron_has_its_inputs_from_the_first_update_on(
        self, cls: type[SET | RigL], min_fan_in: int
    ) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.ConvTranspose2d(6, 4, 3, groups=2), nn.Linear(20, 10))
        for layer in model:
            assert isinstance(layer.weight, Tensor)
            mask = torch.zeros_like(layer.weight, dtype=torch.bool)
            mask.flatten()[:40] = True  # all in the first few neurons, or rows
            layer.register_buffer("weight_mask", mask)
        masks = Masks(model)
        dst = cls(masks, 0.5, 1, stop_at=math.inf, min_fan_in=min_fan_in)
        assert int(masks.fan_in(model.get_parameter("1.weight")).min()) == 0
        for _ in range(5):
            for parameter in masks:
                parameter.grad = torch.randn_like(parameter)
            dst.step()
            for parameter, mask in masks.items():
                assert int(mask.sum()) == 40
                assert int(fan_in(mask, masks.neurons(parameter)).min()) >= min_fan_in

    def test_a_dead_neuron_of_a_transposed_convolution(self) -> None:
        # Neurons 1 and 3 have no input, though all of dimension 0 have some; no large gradient is theirs.
        model = nn.Sequential(nn.ConvTranspose2d(6, 4, 3, groups=2))
        weight = model.get_parameter("0.weight")
        mask = torch.zeros(6, 2, 3, 3, dtype=torch.bool)
        mask[:, 0, 0] = True
        model[0].register_buffer("weight_mask", mask)
        weight.grad = torch.ones(6, 2, 3, 3)
        weight.grad[:, 1] = 1e-3
        masks = Masks(model)
        RigL(masks, 0.5, 1, stop_at=math.inf, min_fan_in=2).step()
        assert masks.fan_in(weight)[1::2].tolist() == [2, 2]
        assert masks.nnz() == 18

    @BOTH
    def test_too_few_active_weights(self, cls: type[SET | RigL]) -> None:
        message = r"min_fan_in is 3: 2 neurons of 'parameter 0' need 6 active weights, it has 4"
        with pytest.raises(ValueError, match=message):
            self.make(cls, min_fan_in=3)
        dst = self.make(cls, min_fan_in=2)
        dst.step()
        self.mask[0, 0] = False
        before = self.mask.clone()
        with pytest.raises(ValueError, match="'parameter 0' need 4 active weights, it has 3"):
            dst.step()
        assert torch.equal(self.mask, before)

    @BOTH
    def test_the_layer_is_named(self, cls: type[SET | RigL]) -> None:
        model = nn.Sequential(nn.Linear(2, 3))
        model[0].register_buffer("weight_mask", torch.eye(3, 2).bool())
        with pytest.raises(ValueError, match=r"3 neurons of '0\.weight' need 3 active weights, it has 2"):
            cls(Masks(model), stop_at=200, min_fan_in=1)

    @BOTH
    @pytest.mark.parametrize("value", [-1, 1.5, True, "2"])
    def test_bad_values(self, cls: type[SET | RigL], value: Any) -> None:
        with pytest.raises(ValueError, match=f"min_fan_in is {value!r}, it must be an integer of at least"):
            self.make(cls, min_fan_in=value)

    @BOTH
    def test_in_the_state(self, cls: type[SET | RigL]) -> None:
        state = self.make(cls, min_fan_in=2).state_dict()
        assert state["min_fan_in"] == 2
        dst = self.make(cls)
        dst.load_state_dict(state)
        assert not updated_by_step(dst)  # all are needed
        del state["min_fan_in"]  # as before there was such an argument
        dst = self.make(cls, min_fan_in=1)
        dst.load_state_dict(state)
        assert dst.min_fan_in == 0
