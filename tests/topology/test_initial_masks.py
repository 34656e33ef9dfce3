"""The mask of one layer: which weights, by hand; ``min_fan_in``; and the same random masks as ever."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hugging_face import Conv1D
from masked_model import make_model, masks_of
from torch import Tensor, nn

from sparseopt_kernels.neurons import Neurons
from sparseopt_kernels.topology.densities import Distribution
from sparseopt_kernels.topology.initial_masks import keep_largest
from sparseopt_kernels.topology.sparsify import sparsify

NAN, INF = float("nan"), float("inf")


def active(mask: Tensor) -> list[int]:
    return mask.flatten().nonzero().flatten().tolist()


def linear(in_features: int, out_features: int) -> Any:
    return nn.Linear(in_features, out_features)


def layer_with(layer: Any, weight: Any) -> Any:
    layer.weight.data = torch.tensor(weight)
    return layer


class TestTheSameAsEver:
    """Answers of version 0.1, which had random masks only."""

    def test_the_weights_themselves(self) -> None:
        model: Any = nn.Sequential(nn.Linear(6, 4), nn.ConvTranspose1d(4, 2, 3))
        sparsify(model, 0.75, "uniform", seed=7)
        assert active(model[0].weight_mask) == [3, 7, 8, 17, 20, 23]
        assert active(model[1].weight_mask) == [2, 6, 7, 15, 18, 19]

    @pytest.mark.filterwarnings("ignore:.*no active weight")
    @pytest.mark.parametrize(
        ("distribution", "digest"),
        [("erk", "d9125417b0ee627d"), ("er", "bc1aedce9c02f628"), ("uniform", "d697c2f9d5ef3897")],
    )
    def test_a_network(self, distribution: Distribution, digest: str) -> None:
        model = make_model()
        sparsify(model, 0.9, distribution, seed=11)
        bits = hashlib.blake2b(digest_size=8)
        for mask in masks_of(model).values():
            bits.update(bytes(mask.flatten().tolist()))
        assert bits.hexdigest() == digest


class TestMagnitude:
    def test_the_largest_and_of_equal_ones_the_first(self) -> None:
        layer = layer_with(nn.Linear(4, 2), [[0.1, -0.5, 0.2, 0.5], [0.3, 0.3, -0.3, -0.05]])
        before = layer.weight.detach().clone()
        masks = sparsify(layer, 0.5, init="magnitude")
        assert active(masks[layer.weight]) == [1, 3, 4, 5]
        assert torch.equal(layer.weight, before * masks[layer.weight])

    def test_all_equal(self) -> None:
        layer = layer_with(nn.Linear(3, 3), [[-1.0] * 3] * 3)
        with pytest.warns(UserWarning, match="no active weight"):
            assert active(sparsify(layer, 0.6, init="magnitude")[layer.weight]) == [0, 1, 2, 3]

    def test_the_seed_does_not_matter(self) -> None:
        first, second = make_model(), make_model()
        a, b = (sparsify(m, 0.6, init="magnitude", seed=s) for s, m in enumerate((first, second)))
        assert all(torch.equal(*pair) for pair in zip(a.values(), b.values(), strict=True))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
    def test_dtypes(self, dtype: torch.dtype) -> None:
        layer = layer_with(nn.Linear(4, 2), [[1.0, -2.0, 3.0, -4.0], [-5.0, 6.0, -7.0, 8.0]]).to(dtype)
        assert active(sparsify(layer, 0.5, init="magnitude", min_fan_in=1)[layer.weight]) == [3, 5, 6, 7]

    def test_memory_format(self) -> None:
        torch.manual_seed(0)
        layer = nn.Conv2d(5, 4, 3)
        score = layer.weight.detach().abs()
        expected = torch.zeros(180, dtype=torch.bool)
        expected[score.flatten().topk(36).indices] = True
        for memory_format in (torch.contiguous_format, torch.channels_last):
            conv: Any = nn.Conv2d(5, 4, 3)
            conv.weight.data = conv.weight.data.contiguous(memory_format=memory_format)
            conv.weight.data.copy_(layer.weight)
            assert torch.equal(sparsify(conv, 0.8, init="magnitude")[conv.weight].flatten(), expected)


class TestKeepLargest:
    SCORE = ((0.1, 0.2, 0.15, 0.05), (9.0, 8.0, 7.0, 6.0))

    @pytest.mark.parametrize(
        ("min_fan_in", "k", "expected"),
        [
            (0, 4, [4, 5, 6, 7]),
            (1, 4, [1, 4, 5, 6]),
            (2, 4, [1, 2, 4, 5]),
            (2, 5, [1, 2, 4, 5, 6]),
            (4, 8, list(range(8))),
        ],
    )
    def test_each_neuron_keeps_its_largest(self, min_fan_in: int, k: int, expected: list[int]) -> None:
        assert active(keep_largest(torch.tensor(self.SCORE), k, Neurons(), min_fan_in)) == expected

    def test_of_equal_scores_the_first_of_the_neuron(self) -> None:
        score = torch.tensor([[1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
        assert active(keep_largest(score, 4, Neurons(), 1)) == [1, 2, 3, 4]
        assert active(keep_largest(score, 4, Neurons(), 2)) == [1, 2, 4, 5]

    def test_nan_comes_last(self) -> None:
        score = torch.tensor([[NAN, 1.0, NAN, INF], [NAN, 0.0, 0.5, NAN]])
        assert active(keep_largest(score, 3, Neurons(), 1)) == [1, 3, 6]
        assert active(keep_largest(score, 6, Neurons(), 3)) == [0, 1, 3, 4, 5, 6]

    def test_the_neurons_of_a_transposed_convolution_in_groups(self) -> None:
        # Neuron (g, j) is fed by weight[2 * g : 2 * g + 2, j]: 9 and 8, 1 and 2; 7 and 6, 3 and 4.
        layer = layer_with(
            nn.ConvTranspose1d(4, 4, 1, groups=2),
            [[[9.0], [1.0]], [[8.0], [2.0]], [[7.0], [3.0]], [[6.0], [4.0]]],
        )
        assert active(sparsify(layer, 0.5, init="magnitude", min_fan_in=1)[layer.weight]) == [0, 3, 4, 7]

    def test_the_neurons_of_hugging_faces_conv1d(self) -> None:
        layer = Conv1D(2, 3)
        layer.weight.data = torch.tensor([[9.0, 1.0], [8.0, 2.0], [7.0, 3.0]])
        masks = sparsify(layer, 0.5, include=["*"], init="magnitude", min_fan_in=1)
        assert active(masks[layer.weight]) == [0, 2, 5]
        assert masks.fan_in(layer.weight).tolist() == [2, 1]


def layers() -> Sequence[Any]:
    return (
        nn.Linear(30, 40),
        nn.Conv2d(6, 12, 3, groups=3),
        nn.ConvTranspose2d(12, 8, 3, groups=4),
        nn.ConvTranspose1d(9, 30, 2),
    )


class TestMinFanIn:
    @pytest.mark.parametrize("init", ["random", "magnitude"])
    @pytest.mark.parametrize("min_fan_in", [1, 2])
    @pytest.mark.parametrize("layer", range(4))
    def test_every_neuron_has_it_and_the_number_stays(self, layer: int, min_fan_in: int, init: Any) -> None:
        for seed in range(5):
            torch.manual_seed(seed)
            model = layers()[layer]
            with torch.no_grad():  # all large weights in one half
                model.weight[model.weight.shape[0] // 2 :] *= 0.01
            masks = sparsify(model, 0.88, init=init, min_fan_in=min_fan_in, seed=seed)
            assert int(masks.fan_in(model.weight).min()) >= min_fan_in
            assert masks.nnz() == round(0.12 * model.weight.numel())

    def test_where_all_neurons_have_it_anyway_nothing_changes(self) -> None:
        for seed in range(10):
            free, kept = linear(30, 8), linear(30, 8)
            masks = [sparsify(free, 0.6, seed=seed), sparsify(kept, 0.6, seed=seed, min_fan_in=4)]
            assert int(masks[0].fan_in(free.weight).min()) >= 4
            assert torch.equal(masks[0][free.weight], masks[1][kept.weight])

    @pytest.mark.filterwarnings("ignore:.*no active weight")
    def test_neurons_that_are_short_take_from_the_others_only_what_they_need(self) -> None:
        short = 0
        for seed in range(20):
            a, b = linear(10, 20), linear(10, 20)
            free = sparsify(a, 0.8, seed=seed)[a.weight]
            kept = sparsify(b, 0.8, seed=seed, min_fan_in=2)[b.weight]
            missing = (2 - free.sum(1)).clamp(min=0)
            grown, dropped = (kept & ~free).sum(1), (free & ~kept).sum(1)
            assert torch.equal(grown, missing)
            assert dropped.sum() == missing.sum()
            assert int(kept.sum(1)[dropped > 0].min()) >= 2 if missing.any() else True
            short += int(missing.any())
        assert short > 10

    def test_all_inputs_of_a_neuron_are_equally_likely(self) -> None:
        counts = torch.zeros(4, 4)
        for seed in range(400):
            layer = linear(4, 4)
            counts += sparsify(layer, 0.75, min_fan_in=1, seed=seed)[layer.weight]
        assert (counts.sum(1) == 400).all()
        assert int((counts - 100).abs().max()) < 35  # four standard deviations

    def test_a_known_answer(self) -> None:
        layer = linear(4, 4)
        assert active(sparsify(layer, 0.75, min_fan_in=1, seed=3)[layer.weight]) == [0, 5, 8, 12]

    def test_it_is_all_that_a_layer_has(self) -> None:
        layer = linear(3, 5)
        masks = sparsify(layer, 0.0, min_fan_in=3)
        assert masks[layer.weight].all()

    def test_a_layer_without_weights(self) -> None:
        model = nn.Sequential(nn.Linear(3, 0), nn.Linear(0, 4), nn.Linear(4, 4))
        assert sparsify(model, 0.5, min_fan_in=1).nnz() == 8
