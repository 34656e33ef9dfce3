"""What ``sparsify`` says: once what stays dense, once which neurons are dead, and nothing without need."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hugging_face import Conv1D
from masked_model import make_model
from torch import nn

from sparseopt_kernels.finished.finalize import finalize
from sparseopt_kernels.lab.training.models import build_model
from sparseopt_kernels.topology.sparsify import sparsify


def said(model: nn.Module, sparsity: Any = 0.5, *args: Any, **options: Any) -> list[str]:
    """The warnings of a call, each of which points at this file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sparsify(model, sparsity, *args, **options)
    assert all(record.filename == __file__ for record in caught)
    assert all(record.category is UserWarning for record in caught)
    return [str(record.message) for record in caught]


def dense(model: nn.Module, sparsity: Any = 0.5, **options: Any) -> str:
    """What is said of weights that stay dense, or nothing."""
    notices = [notice for notice in said(model, sparsity, **options) if "left dense" in notice]
    assert len(notices) < 2
    return "".join(notices)


def dead(model: nn.Module, *args: Any, **options: Any) -> str:
    """What is said of dead neurons, or nothing."""
    notices = [notice for notice in said(model, *args, **options) if "no active weight" in notice]
    assert len(notices) < 2
    return "".join(notices)


UNUSUAL: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "attention": (
        lambda: nn.MultiheadAttention(8, 2),
        ["'layer.in_proj_weight' (MultiheadAttention, 192 weights, 48.5% of the model)"],
    ),
    "embedding": (lambda: nn.Embedding(30, 8), ["'layer.weight' (Embedding, 240 weights, 69.0% of the mod"]),
    "lstm": (
        lambda: nn.LSTM(3, 4),
        ["'layer.weight_ih_l0' (LSTM, 48 weights, ", "'layer.weight_hh_l0' (LSTM, 64 weights, "],
    ),
    "gru": (lambda: nn.GRU(3, 4), ["'layer.weight_ih_l0' (GRU, 36 ", "'layer.weight_hh_l0' (GRU, 48 "]),
    "bilinear": (lambda: nn.Bilinear(3, 4, 5), ["'layer.weight' (Bilinear, 60 weights, 34.7% of"]),
    "conv1d": (lambda: Conv1D(4, 8), ["'layer.weight' (Conv1D, 32 weights, 22.2% of the model)"]),
}


class TestLeftDense:
    @pytest.mark.parametrize("kind", UNUSUAL)
    def test_which_and_how_large(self, kind: str) -> None:
        make, expected = UNUSUAL[kind]
        notice = dense(nn.ModuleDict({"layer": make(), "fc": nn.Linear(11, 9)}))
        for words in expected:
            assert words in notice
        assert "fc" not in notice
        assert len(re.findall(r"weights, ", notice)) == len(expected)  # no bias, no norm

    @pytest.mark.parametrize("kind", UNUSUAL)
    def test_what_it_advises_is_right(self, kind: str) -> None:
        make, _ = UNUSUAL[kind]

        def model() -> nn.Module:
            return nn.ModuleDict({"layer": make(), "fc": nn.Linear(11, 9)})

        included = re.search(r"include=\('(.*?)',\)", dense(model()))
        assert included is not None
        for argument in ("include", "exclude"):
            assert included[1] not in dense(model(), **{argument: (included[1],)}).partition("include")[0]
            assert dense(model(), **{argument: ["layer*"]}) == ""

    @pytest.mark.parametrize("name", ["mlp", "convnet", "resnet8", "resnet20"])
    def test_plain_networks_are_passed_over_in_silence(self, name: str) -> None:
        assert said(build_model(name, (3, 16, 16), 10), 0.9) == []
        assert said(build_model(name, (3, 16, 16), 10), 0.9, exclude=["classifier"]) == []

    def test_norms_biases_and_vectors_are_no_weights(self) -> None:
        model = nn.ModuleDict(
            {"fc": nn.Linear(8, 8), "norm": nn.LayerNorm((3, 8)), "rms": nn.RMSNorm((3, 8))}
        )
        model.register_parameter("class_token", nn.Parameter(torch.zeros(1, 1, 8)))
        model.register_parameter("bias", nn.Parameter(torch.zeros(3, 8)))
        assert said(model) == []

    def test_a_transformer(self) -> None:
        layer = nn.TransformerEncoderLayer(16, 2, 32)
        notice = dense(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
        assert "'layers.0.self_attn.in_proj_weight' (MultiheadAttention, 768 weights" in notice
        assert "'layers.1.self_attn.in_proj_weight' (MultiheadAttention, 768 weights" in notice
        assert notice.count("weights, ") == 2

    def test_repeated_layers_are_named_together_where_there_are_many(self) -> None:
        layers = nn.ModuleList(
            nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "mlp": Conv1D(32, 8)}) for _ in range(12)
        )
        model = nn.ModuleDict({"h": layers, "wte": nn.Embedding(100, 8)})
        notice = dense(model)
        assert "'h.*.mlp.weight' (12 x Conv1D, 3,072 weights, " in notice
        assert "'h.*.attn.in_proj_weight' (12 x MultiheadAttention, 2,304 weights, " in notice
        places = [notice.index(words) for words in ("h.*.mlp", "h.*.attn", "'wte.weight' (Embedding, 800 w")]
        assert places == sorted(places)

    def test_more_than_it_names_are_counted(self) -> None:
        model = nn.ModuleDict({f"e{chr(97 + i)}": nn.Embedding(10 + i, 2) for i in range(9)})
        model["fc"] = nn.Linear(2, 2)
        notice = dense(model)
        assert "'ei.weight' (Embedding, 36 weights" in notice
        assert "and 3 more (66 weights, " in notice

    def test_a_shared_classifier_is_masked(self) -> None:
        model = nn.ModuleDict({"wte": nn.Embedding(9, 4), "head": nn.Linear(4, 9)})
        model["head"].weight = model["wte"].weight
        assert said(model) == []

    def test_of_a_mapping_only_what_its_patterns_match(self) -> None:
        def model() -> nn.Module:
            blocks = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
            return nn.ModuleDict({"wte": nn.Embedding(9, 8), "h": blocks, "fc": nn.Linear(8, 8)})

        assert dense(model(), {"fc": 0.5}) == ""
        assert "'h.attn.in_proj_weight'" in dense(model(), {"h.*": 0.5})
        assert "wte" not in dense(model(), {"h.*": 0.5})
        assert dense(model(), {"h.*": 0.5}, include=["*.in_proj_weight"]) == ""

    def test_masked_layers_are_not_dense(self) -> None:
        model = nn.ModuleDict({"emb": nn.Embedding(9, 8), "fc": nn.Linear(8, 8)})
        assert dense(model, {"emb": 0.5}, include=["emb"]) == ""
        assert said(model, 0.5) == []
        assert list(dict(model.named_buffers())) == ["emb.weight_mask", "fc.weight_mask"]

    def test_computed_weights_are_named_by_their_own_warning(self) -> None:
        model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
        assert [notice for notice in said(model) if "left out" not in notice] == []


class TestDeadNeurons:
    def test_known_counts(self) -> None:
        model = nn.ModuleDict({name: nn.Linear(4, rows) for name, rows in (("a", 12), ("b", 4), ("c", 3))})
        for name, values in (("a", [9] * 8 + [0] * 4), ("b", [9, 0, 0, 0]), ("c", [1, 1, 1])):
            model[name].weight.data = torch.tensor(values).float()[:, None] + torch.rand(len(values), 4)
        sparsities = {"a": 1 / 3, "b": 0.75, "c": 0.0}
        notice = dead(model, sparsities, init="magnitude")
        assert notice.startswith("neurons with no active weight")
        assert ": 7 (3 of 4 in 'b.weight', 4 of 12 in 'a.weight'). " in notice
        assert "'c.weight'" not in notice

    def test_the_neurons_of_a_transposed_convolution(self) -> None:
        layer = nn.ConvTranspose1d(4, 4, 1, groups=2)
        layer.weight.data = torch.tensor([[9.0, 1], [8, 2], [7, 3], [6, 4]]).unsqueeze(2)
        assert ": 2 (2 of 4 in 'weight')" in dead(layer, 0.5, init="magnitude")

    def test_the_worst_are_named_and_the_others_counted(self) -> None:
        model = nn.Sequential(*(nn.Linear(3, 10 + i) for i in range(9)))
        notice = dead(model, 0.95, "uniform")
        assert notice.count(" of ") == 6
        assert "and others in 3 more layers" in notice

    def test_a_head_of_one_neuron_keeps_a_weight(self) -> None:
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
        masks = sparsify(model, 0.995, "uniform", exclude=["0"])
        assert masks.nnz() == 1
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
        assert "of 64 in '0.weight')" in dead(model, 0.995, "uniform")

    @pytest.mark.parametrize("name", ["mlp", "convnet", "resnet8", "resnet20"])
    @pytest.mark.parametrize("sparsity", [0.8, 0.95])
    def test_erk_is_passed_over_in_silence(self, name: str, sparsity: float) -> None:
        assert said(build_model(name, (3, 32, 32), 10), sparsity) == []

    def test_min_fan_in_leaves_none(self) -> None:
        assert dead(make_model(), 0.9, "uniform", seed=11)
        assert dead(make_model(), 0.9, "uniform", seed=11, min_fan_in=1) == ""

    @pytest.mark.filterwarnings("ignore:Initializing zero-element")
    def test_neurons_that_never_had_a_weight_do_not_count(self) -> None:
        assert dead(nn.Sequential(nn.Linear(0, 5), nn.Linear(5, 4)), 0.0) == ""


class TestWeightsThatAreZero:
    """A model that was sparse, without its masks: random ones would keep little of it."""

    @staticmethod
    def notices(model: nn.Module, *args: Any, **options: Any) -> list[str]:
        return [notice for notice in said(model, *args, **options) if "are 0 already" in notice]

    def model(self, sparsity: float = 0.9) -> nn.Module:
        model = nn.Sequential(nn.Linear(40, 50), nn.ReLU(), nn.Linear(50, 30))
        sparsify(model, sparsity, "uniform", min_fan_in=1)
        return finalize(model)

    def test_are_told(self) -> None:
        (notice,) = self.notices(self.model(), 0.9, "uniform", seed=1)
        assert re.match(r"1\d\d of the 200 active weights of '0.weight' \(and most in 1 more\) are 0", notice)

    def test_not_if_the_largest_are_kept(self) -> None:
        assert self.notices(self.model(), 0.9, "uniform", init="magnitude") == []

    def test_not_if_they_are_few(self) -> None:
        assert self.notices(self.model(0.3), 0.9, "uniform", seed=1) == []

    def test_not_in_a_new_layer(self) -> None:
        model = nn.Sequential(nn.Linear(40, 50), nn.ReLU(), nn.Linear(50, 30))
        nn.init.zeros_(model.get_parameter("2.weight"))
        assert self.notices(model, 0.9, "uniform") == []
