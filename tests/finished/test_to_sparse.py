"""Sparse copies for inference."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import sparseopt_kernels as sk
from sparseopt_kernels.finished.to_sparse import LARGEST_DENSITY, LEAST_WEIGHTS, SparseLinear

pytestmark = pytest.mark.skipif(
    not torch.backends.mkl.is_available(), reason="PyTorch was built without MKL: nothing is converted"
)


def make(sparsity: float = 0.95, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(1024, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 10))
    sk.sparsify(model, sparsity, "uniform", exclude=("3",), seed=seed)
    return model


def saved_and_loaded(value: object, weights_only: bool) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


class TestTheCopy:
    def test_large_sparse_layers_are_csr(self) -> None:
        model = make()
        sparse = sk.to_sparse(model)
        assert type(sparse[0]) is SparseLinear
        assert sparse[0].weight.layout is torch.sparse_csr
        assert torch.equal(sparse[0].weight.to_dense(), model[0].weight)
        assert type(sparse[3]) is nn.Linear

    @pytest.mark.parametrize("rows", [(), (1,), (2,), (64,), (65,), (200,), (0,), (3, 5), (2, 0, 4), (1, 1)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("bias", [True, False])
    def test_it_computes_what_the_dense_layer_does(
        self, rows: tuple[int, ...], dtype: torch.dtype, bias: bool
    ) -> None:
        torch.manual_seed(0)
        layer = nn.Linear(1024, 512, bias=bias, dtype=dtype)
        sk.sparsify(layer, 0.95)
        x = torch.randn(*rows, 1024, dtype=dtype)
        found, expected = sk.to_sparse(layer)(x), layer(x)
        # float32: sums of about 50 products in another order.
        tolerance = 1e-5 if dtype == torch.float32 else 1e-13
        torch.testing.assert_close(found, expected.detach(), rtol=0, atol=tolerance)
        assert found.is_contiguous()

    def test_inputs_in_any_memory_format(self) -> None:
        layer = make()[0]
        sparse = sk.to_sparse(layer)
        for x in (
            torch.randn(1024, 70).t(),
            torch.randn(70, 2048)[:, ::2],
            torch.randn(1024).expand(70, 1024),
        ):
            torch.testing.assert_close(sparse(x), layer(x).detach(), rtol=0, atol=1e-5)

    def test_the_model_itself_is_not_changed(self) -> None:
        model = make()
        before = copy.deepcopy(model.state_dict())
        sk.to_sparse(model)
        assert model.training
        assert all(p.requires_grad for p in model.parameters())
        assert list(model.state_dict()) == list(before)
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())

    def test_weights_outside_the_mask_are_left_out(self) -> None:
        model = make()
        with torch.no_grad():
            model[0].weight.fill_(1.0)
        sparse = sk.to_sparse(model)
        assert len(sparse[0].values) == int(model[0].weight_mask.count_nonzero())
        assert model[0].weight.eq(1.0).all()

    def test_a_finalized_model_is_converted_too(self) -> None:
        assert type(sk.to_sparse(sk.finalize(make()))[0]) is SparseLinear

    def test_a_model_pruned_by_pytorch(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1024, 512))
        prune.random_unstructured(model[0], "weight", amount=0.95)
        x = torch.randn(3, 1024)
        expected = model(x)
        sparse = sk.to_sparse(model)
        torch.testing.assert_close(sparse(x), expected.detach(), rtol=0, atol=1e-5)
        assert prune.is_pruned(model)

    def test_layers_that_share_a_weight_share_its_memory(self) -> None:
        model: Any = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 1024))
        model[1].weight = model[0].weight
        sk.sparsify(model, 0.95)
        sparse = sk.to_sparse(model)
        assert sparse[0].values.data_ptr() == sparse[1].values.data_ptr()

    def test_hooks_stay(self) -> None:
        model = make()
        calls: list[int] = []
        model[0].register_forward_hook(lambda *_: calls.append(1))
        sk.to_sparse(model)(torch.randn(2, 1024))
        assert calls == [1]

    def test_a_layer_without_any_weight(self) -> None:
        layer = nn.Linear(1024, 512)
        with torch.no_grad():
            layer.weight.zero_()
        for rows in (1, 5):
            assert torch.equal(
                sk.to_sparse(layer)(torch.randn(rows, 1024)), layer.bias.detach().expand(rows, -1)
            )

    def test_autocast_leaves_it_in_its_dtype(self) -> None:
        sparse = sk.to_sparse(make())
        x = torch.randn(4, 1024)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(sparse[0](x), sparse[0](x))
            assert sparse[0](x.bfloat16()).dtype == torch.float32
            assert sparse(x).shape == (4, 10)


class TestWhatStaysDense:
    @pytest.mark.parametrize(
        ("layer", "sparsity"),
        [
            (nn.Linear(1024, 511), 0.95),
            (nn.Linear(1024, 512), 0.89),
            (nn.Linear(1024, 512, dtype=torch.bfloat16), 0.95),
            (nn.Linear(1024, 512, dtype=torch.float16), 0.95),
            (nn.Conv2d(256, 256, 3), 0.95),
            (nn.modules.linear.NonDynamicallyQuantizableLinear(1024, 512), 0.95),
        ],
        ids=["small", "dense", "bfloat16", "float16", "convolution", "subclass"],
    )
    def test_it_is_said(self, layer: nn.Module, sparsity: float) -> None:
        sk.sparsify(layer, sparsity)
        with pytest.warns(UserWarning, match=r"leaves all layers dense: none is an nn\.Linear on the CPU"):
            sparse = sk.to_sparse(layer)
        assert type(sparse) is type(layer)
        assert not list(sparse.buffers())

    def test_the_rule_at_its_edge(self) -> None:
        layer: Any = nn.Linear(1024, LEAST_WEIGHTS // 1024)
        active = math.ceil(LARGEST_DENSITY * LEAST_WEIGHTS)
        mask = torch.arange(LEAST_WEIGHTS).view(-1, 1024) < active
        layer.register_buffer("weight_mask", mask)
        assert type(sk.to_sparse(layer)) is SparseLinear
        layer.weight_mask.view(-1)[active] = True
        with pytest.warns(UserWarning, match="leaves all layers dense"):
            assert type(sk.to_sparse(layer)) is nn.Linear

    def test_sparsity_of_nine_tenths_is_enough(self) -> None:
        """``sparsify`` rounds the number of active weights up here."""
        layer = nn.Linear(1024, 1024)
        assert sk.sparsify(layer, 0.9).nnz() > 0.1 * 2**20
        assert type(sk.to_sparse(layer)) is SparseLinear

    def test_without_mkl_it_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
        model = make()
        with pytest.warns(UserWarning, match="without MKL: to_sparse leaves all layers dense"):
            sparse = sk.to_sparse(model)
        assert list(sparse.state_dict()) == list(sk.finalize(model).state_dict())

    def test_a_sparse_model_that_was_saved_runs_without_mkl(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sparse = sk.to_sparse(make())
        x = torch.randn(1, 1024)
        expected = sparse(x)
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
        torch.testing.assert_close(sparse(x), expected, rtol=0, atol=1e-5)


class TestInference:
    def test_training_it_is_an_error(self) -> None:
        sparse = sk.to_sparse(make())
        assert not sparse.training
        assert not any(p.requires_grad for p in sparse.parameters())
        sparse.eval()
        with pytest.raises(RuntimeError, match="for inference: train the masked model"):
            sparse.train()

    def test_gradients_of_the_input(self) -> None:
        model = make().eval()
        x = torch.randn(70, 1024, requires_grad=True)
        twin = x.detach().clone().requires_grad_()
        sk.to_sparse(model)(x).square().sum().backward()
        model(twin).square().sum().backward()
        torch.testing.assert_close(x.grad, twin.grad, rtol=0, atol=1e-5)

    def test_halves_are_an_error(self) -> None:
        with pytest.raises(TypeError, match=r"must be float32 or float64, and became torch\.bfloat16"):
            sk.to_sparse(make()).to(torch.bfloat16)

    def test_double(self) -> None:
        model = make().eval()
        x = torch.randn(5, 1024, dtype=torch.float64)
        found = sk.to_sparse(model).double()(x)
        torch.testing.assert_close(found, model.double()(x).detach(), rtol=0, atol=1e-12)

    @pytest.mark.parametrize("padded", [False, True])
    def test_a_transformer_of_pytorch(self, padded: bool) -> None:
        """In eval mode its fused path reads the weights of its layers, which it must not here."""
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(256, 4, 2048, batch_first=True)
        model: Any = nn.TransformerEncoder(layer, 2).eval()
        sk.sparsify(model, 0.95, "uniform")
        sparse = sk.to_sparse(model)
        assert type(sparse.layers[0].linear1) is SparseLinear
        x = torch.randn(2, 7, 256)
        padding = torch.arange(7).expand(2, 7) > 4 if padded else None
        with torch.no_grad():
            found, expected = (m(x, src_key_padding_mask=padding)[:, :5] for m in (sparse, model))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


class TestSavedAndLoaded:
    @pytest.mark.parametrize(
        "duplicate",
        [copy.deepcopy, lambda model: saved_and_loaded(model, weights_only=False)],
        ids=["deepcopy", "torch.save"],
    )
    def test_as_a_whole(self, duplicate: Callable[[nn.Module], Any]) -> None:
        sparse = sk.to_sparse(make())
        twin = duplicate(sparse)
        x = torch.randn(5, 1024)
        assert torch.equal(twin(x), sparse(x))
        assert twin[0].weight.layout is torch.sparse_csr

    def test_its_state_dict(self) -> None:
        model = make()
        with torch.no_grad():
            model[0].weight[0] = 0.0  # weights that are active and zero: fewer are saved
        sparse, other = sk.to_sparse(model), sk.to_sparse(make(seed=1))
        assert len(sparse[0].values) != len(other[0].values)
        other.load_state_dict(saved_and_loaded(sparse.state_dict(), weights_only=True))
        x = torch.randn(5, 1024)
        assert torch.equal(other(x), sparse(x))

    def test_it_is_smaller(self) -> None:
        sizes = []
        for model in (sk.to_sparse(make(0.95)), sk.finalize(make(0.95))):
            file = io.BytesIO()
            torch.save(model[:1].state_dict(), file)
            sizes.append(len(file.getvalue()))
        assert sizes[0] < 0.12 * sizes[1]  # 4 + 4 bytes for a twentieth of the weights, instead of 4 for each

    @pytest.mark.parametrize(
        ("part", "broken", "message"),
        [
            ("col_indices", lambda t: t + 1000, "0 <= col_indices < ncols"),
            ("crow_indices", lambda t: t.flip(0), "crow_indices"),
            ("values", lambda t: t[:-1], "col_indices.shape[-1] must be equal to nnz"),
            ("values", None, "it has crow_indices and col_indices, it must have"),
        ],
        ids=["columns", "rows", "fewer values", "no values"],
    )
    @pytest.mark.parametrize("strict", [True, False])
    def test_indices_that_lead_out_of_memory_are_refused(
        self, part: str, broken: Callable[[Tensor], Tensor] | None, message: str, strict: bool
    ) -> None:
        sparse = sk.to_sparse(make())
        state = copy.deepcopy(sparse.state_dict())
        value = state.pop(f"0.{part}")
        if broken is not None:
            state[f"0.{part}"] = broken(value)
        x = torch.randn(5, 1024)
        before = sparse(x)
        with pytest.raises(RuntimeError, match=r"the sparse weight 0\.weight cannot be loaded: ") as error:
            sparse.load_state_dict(state, strict=strict)
        assert message in str(error.value).replace("`", "")
        assert torch.equal(sparse(x), before)

    def test_a_dense_state_dict_is_an_error(self) -> None:
        with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0\.crow_indices"'):
            sk.to_sparse(make()).load_state_dict(sk.finalize(make()).state_dict())
