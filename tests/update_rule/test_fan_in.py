"""The fan-in that backends count, and Eq. 12 of it: exactly."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from backends import Backend
from rules import DTYPES
from side_by_side import PATTERNS, pattern_mask
from torch import Tensor
from torch.nn.parameter import Parameter

from sparseopt_kernels import kernels
from sparseopt_kernels.correction import FanIn, correction_factors
from sparseopt_kernels.kernels.contract import ParamState
from sparseopt_kernels.kernels.memory import dim_order
from sparseopt_kernels.neurons import Neurons, arithmetic_dtype, fan_in
from sparseopt_kernels.optimizer import SparseOpt
from sparseopt_kernels.step.factors import with_sizes


def param_of(mask: Tensor, dtype: torch.dtype, neurons: Neurons) -> ParamState:
    parameter = torch.zeros_like(mask, dtype=dtype)
    return ParamState(
        parameter=parameter,
        momentum_buffer=None,
        mask=mask,
        given_mask=mask,
        gradient_dtype=dtype,
        dim_order=dim_order(parameter),
        neurons=neurons,
        rule=0,
        ham=True,
    )


def counted(backend: Backend, params: list[ParamState]) -> FanIn:
    """What the backend counts of the parameters that it supports, which is compared with a plain count."""
    counting = kernels.BACKENDS[backend.name]
    params = [param for param in params if counting.supports(param)]
    if not params:
        pytest.skip("the backend leaves all of them to the reference")
    found = with_sizes(counting.fan_in(params), [p.neurons.sizes(p.parameter.shape) for p in params])
    masks = [param.mask for param in params if param.mask is not None]
    plain = [fan_in(mask, param.neurons) for mask, param in zip(masks, params, strict=True)]
    sizes = [len(own) for own in plain]
    assert found.counts.is_floating_point()
    assert found.counts.tolist() == torch.cat(plain).tolist()
    assert found.neurons.tolist() == sizes
    assert found.full.tolist() == [mask.numel() // size for mask, size in zip(masks, sizes, strict=True)]
    assert found.mean is None
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_backends_count(backend: Backend, dtype: torch.dtype) -> None:
    """Of several layers at once, and of each alone."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(7,), (3, 5), (40, 27), (6, 64), (3, 1031), (16, 3, 3, 3), (1, 700)]
    params = [
        param_of(pattern_mask(pattern, shape, generator), dtype, Neurons())
        for shape in shapes
        for pattern in PATTERNS
    ]
    found = counted(backend, params)
    factors = correction_factors(found, "layer")
    # A backend may compute in more digits than it updates in.
    assert torch.finfo(factors.c.dtype).eps <= torch.finfo(arithmetic_dtype(dtype)).eps
    for param, c in zip(params, torch.split(factors.c, found.neurons.tolist()), strict=True):
        assert torch.equal(correction_factors(counted(backend, [param]), "layer").c, c)


@pytest.mark.parametrize("neurons", [Neurons(), Neurons(dim=1), Neurons(dim=1, groups=2)], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_other_layouts(backend: Backend, neurons: Neurons, memory_format: torch.memory_format) -> None:
    """Transposed convolutions, and channels-last memory."""
    mask = pattern_mask("half", (6, 4, 3, 5), torch.Generator().manual_seed(1))
    counted(backend, [param_of(mask.to(memory_format=memory_format), torch.float32, neurons)])


def test_bytes_that_are_not_1(backend: Backend) -> None:
    """A view of bytes may have them: whatever is not 0 is active."""
    mask = torch.arange(9 * 256).remainder(256).to(torch.uint8).view(torch.bool).view(9, 256)
    param = param_of(mask, torch.float32, Neurons())
    assert kernels.BACKENDS[backend.name].fan_in([param]).tolist() == [255.0] * 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_factors_are_rounded_to_the_nearest(dtype: torch.dtype) -> None:
    """As IEEE 754 has it, which is what kernels compute; and as they are for each layer alone."""
    generator = torch.Generator().manual_seed(2)
    sizes = [50_000, 33, 1, 7]
    counts = [torch.randint(0, 5000, (size,), generator=generator) for size in sizes]
    layers = [
        FanIn(
            own.to(dtype),
            neurons=torch.tensor([len(own)]),
            full=torch.tensor([5000]),
        )
        for own in counts
    ]
    together = FanIn(
        torch.cat(counts).to(dtype),
        neurons=torch.tensor(sizes),
        full=torch.full((4,), 5000),
    )
    numbers = np.float32 if dtype == torch.float32 else np.float64
    for correction in ("layer", "unnormalized"):
        parts = torch.split(correction_factors(together, correction).c, sizes)
        for own, layer, part in zip(counts, layers, parts, strict=True):
            mean = int(own.sum()) / len(own)
            divisor = numbers(5000 if correction == "unnormalized" else mean or 1)
            expected = torch.from_numpy(np.sqrt(own.numpy().astype(numbers) / divisor))
            assert torch.equal(part, expected)
            assert torch.equal(correction_factors(layer, correction).c, expected)


def test_a_part_of_a_layer_has_the_mean_of_all_of_it() -> None:
    whole = FanIn(
        torch.tensor([1.0, 2.0, 0.0, 5.0]),
        neurons=torch.tensor([4]),
        full=torch.tensor([5]),
    )
    mean = torch.tensor([2.0], dtype=torch.float64)
    c = correction_factors(whole, "layer").c
    for part in (slice(0, 1), slice(1, 4)):
        counts = whole.counts[part]
        own = FanIn(counts, torch.tensor([len(counts)]), whole.full, mean)
        assert torch.equal(correction_factors(own, "layer").c, c[part])


@pytest.mark.parametrize("correction", ["layer", "unnormalized"])
def test_kernels_apply_these_factors(backend: Backend, correction: Literal["layer", "unnormalized"]) -> None:
    """The three places of Eq. 12 agree to the last bit: Python, ``update_rule.h``, its twin in Triton.

    On a GPU, the first step counts and updates in one pass, and the second one is handed the factors.
    """
    mask = (
        torch.rand(37, 61, generator=torch.Generator().manual_seed(3)) < torch.linspace(0, 0.9, 37)[:, None]
    )
    p = Parameter(torch.zeros(37, 61))
    p.grad = -torch.ones(37, 61)
    optimizer = SparseOpt([p], lr=1.0, masks={p: mask}, correction=correction, backend=backend.name)
    param = param_of(mask, torch.float32, Neurons())
    found = with_sizes(kernels.BACKENDS[backend.name].fan_in([param]), [(37, 61)])
    expected = correction_factors(found, correction).c.float().unsqueeze(1) * mask
    for steps in (1.0, 2.0):
        optimizer.step()
        assert torch.equal(p.detach(), steps * expected)
