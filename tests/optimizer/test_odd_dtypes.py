"""Complex, sparse and negated tensors, gradients of another dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends import Backend
from torch import Tensor
from torch.nn.parameter import Parameter
from watched import Watched, randn, random_mask

from sparseopt_kernels.optimizer import SparseOpt


@pytest.mark.parametrize("pattern", [None, "half", "empty-rows"], ids=str)
@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex64], ids=str)
@pytest.mark.parametrize("shape", [(), (5,), (7, 27), (4, 3, 3, 3)], ids=str)
def test_complex(backend: Backend, shape: tuple[int, ...], dtype: torch.dtype, pattern: str | None) -> None:
    """Pairs of real numbers; the buffer is complex as the parameter is; masks change on the way."""
    mask = None if pattern is None else random_mask(shape, pattern=pattern)
    watched = Watched(backend, Parameter(randn(shape, dtype)), mask)
    for step in range(8):
        if mask is not None and pattern is not None and step % 3 == 2:
            mask.copy_(random_mask(shape, step, pattern))
        watched.step(randn(shape, dtype, step))
    assert watched.optimizer.state[watched.parameter]["momentum_buffer"].dtype == dtype


@pytest.mark.parametrize("nesterov", [False, True], ids=["heavy-ball", "nesterov"])
def test_complex_without_a_mask_is_sgd(backend: Backend, nesterov: bool) -> None:
    """To rounding: PyTorch multiplies by a complex number where we multiply two real ones."""
    ours, theirs = (Parameter(randn((6, 9), torch.complex128)) for _ in range(2))
    common: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": nesterov}
    optimizer = SparseOpt([ours], **common, backend=backend.name)
    sgd = torch.optim.SGD([theirs], **common, foreach=False)
    for step in range(5):
        ours.grad, theirs.grad = (randn((6, 9), torch.complex128, step) for _ in range(2))
        optimizer.step()
        sgd.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)


def test_conjugated_and_negated_gradients(backend: Backend) -> None:
    """Gradients that are lazy views: the conj and neg bits of PyTorch."""
    watched = Watched(backend, Parameter(randn((4, 9), torch.complex128)), random_mask((4, 9)))
    for step in range(3):
        watched.step(randn((4, 9), torch.complex128, step).conj())
    watched = Watched(backend, Parameter(randn((4, 9))), random_mask((4, 9)))
    for step in range(3):
        grad = randn((4, 9), torch.complex128, step).conj().imag
        assert grad.is_neg()
        watched.step(grad)


def test_negated_gradient_of_a_single_number(backend: Backend) -> None:
    """One number is contiguous whatever its stride: its neg bit is all that tells."""
    imaginary = Parameter(torch.ones(1, 1))
    z = torch.complex(torch.zeros(1, 1), imaginary).conj()
    torch.view_as_real(z.resolve_conj()).sum().backward()
    assert imaginary.grad is not None
    assert imaginary.grad.item() == -1.0
    SparseOpt([imaginary], lr=1.0, backend=backend.name).step()
    assert imaginary.item() == 2.0


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex128], ids=str)
def test_sparse_gradient_of_a_dense_parameter(backend: Backend, dtype: torch.dtype, momentum: float) -> None:
    """Embedding(sparse=True) without a mask: the same as with the dense gradient."""
    params = [Parameter(randn((10, 4), dtype)) for _ in range(2)]
    for p in params:
        optimizer = SparseOpt([p], lr=0.1, momentum=momentum, max_grad_norm=1.0, backend=backend.name)
        for step in range(4):
            values = randn((3, 4), dtype, step)
            grad = torch.sparse_coo_tensor(
                torch.tensor([[1, 7, 1]]), values, (10, 4), check_invariants=True
            )  # 1 comes twice
            p.grad = grad if p is params[0] else grad.to_dense()
            optimizer.step()
            assert p.grad.is_sparse == (p is params[0])
    torch.testing.assert_close(params[0], params[1], rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this PyTorch ties a gradient to its dtype")
@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_gradient_of_a_narrow_parameter(backend: Backend, dtype: torch.dtype, masked: bool) -> None:
    parameter = Parameter(randn((5, 33), dtype))
    parameter.grad_dtype = torch.float32
    watched = Watched(backend, parameter, random_mask((5, 33)) if masked else None)
    for step in range(4):
        watched.step(randn((5, 33), torch.float32, step))


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this PyTorch ties a gradient to its dtype")
@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
def test_gradients_of_another_dtype_each_step(backend: Backend, masked: bool) -> None:
    parameter = Parameter(randn((5, 33), torch.bfloat16))
    parameter.grad_dtype = None
    watched = Watched(backend, parameter, random_mask((5, 33)) if masked else None)
    for step in range(6):
        dtype = (torch.bfloat16, torch.float32)[step // 2 % 2]
        watched.step(randn((5, 33), dtype, step))
