"""Updates of masks by PyTorch and by the native library, side by side, and layers for them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from sparseopt_kernels.neurons import Neurons
from sparseopt_kernels.topology.drop_and_grow import (
    Change,
    DropAndGrow,
    LayerTensors,
    Ranking,
    TorchDropAndGrow,
)
from sparseopt_kernels.topology.hooks import Counts
from sparseopt_kernels.topology.layer_update import LayerUpdate
from sparseopt_kernels.topology.native_drop_and_grow import NativeDropAndGrow, supports
from sparseopt_kernels.topology.seeding import generator

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# With many ties; 6e-8 is subnormal in half precision, 1e-40 in float32 and bfloat16.
SPECIAL = [0.0, -0.0, 1.0, -1.0, 1.0, 2.0, -2.0, 6e-8, 1e-40, -1e-40, 6e4, math.inf, -math.inf, math.nan]


def layer_of(parameter: Tensor, mask: Tensor, gradient: Tensor | None) -> LayerTensors:
    own = nn.Parameter(parameter)
    own.grad = gradient
    return LayerTensors(own, mask, mask.clone())


def copy_of(layer: LayerTensors) -> LayerTensors:
    parameter, mask, explored = (tensor.detach().clone() for tensor in layer)
    copy = layer_of(parameter, mask, layer.parameter.grad)
    return copy._replace(explored=explored)


def update(
    updates: DropAndGrow, layers: list[LayerTensors], k: list[int], grow: str
) -> tuple[bool, list[LayerUpdate]]:
    """Drop and grow ``k`` weights of each layer; tell whether gradients are finite, and how masks changed."""
    gradients = [layer.parameter.grad for layer in layers]
    rankings = [Ranking(i, g, at_most=k[i]) for i, g in enumerate(gradients) if g is not None]
    finite = updates.rank(rankings)
    changes = [
        Change(Counts(n, n), generator=generator(3, i, 1) if grow == "random" else None)
        for i, n in enumerate(k)
    ]
    return finite, updates.update(changes)


@torch.no_grad()
def compare(
    layers: list[LayerTensors],
    k: list[int],
    grow: str,
    threads: int = 1,
    *,
    min_fan_in: int = 0,
    neurons: list[Neurons] | None = None,
) -> list[LayerTensors]:
    """Update copies by PyTorch and by the library; return the latter, whose bits are the former's."""
    expected, found = [copy_of(layer) for layer in layers], [copy_of(layer) for layer in layers]
    gradients = [None if g is None else g.clone() for g in (layer.parameter.grad for layer in layers)]
    assert supports(found)
    torch.set_num_threads(threads)
    neurons = neurons or [Neurons()] * len(layers)
    told = update(NativeDropAndGrow(found, neurons, min_fan_in), found, k, grow)
    torch.set_num_threads(1)
    assert told == update(TorchDropAndGrow(expected, neurons, min_fan_in), expected, k, grow)
    for want, got, old, gradient in zip(expected, found, layers, gradients, strict=True):
        assert got.mask.count_nonzero() == old.mask.count_nonzero()
        for wanted, tensor in zip(want, got, strict=True):
            # The bits: NaN is not equal to itself, and -0.0 equals 0.0.
            assert torch.equal(bits_of(tensor), bits_of(wanted))
        if gradient is not None:
            assert torch.equal(bits_of(got.parameter.grad), bits_of(gradient))
    return found


def bits_of(tensor: Any) -> Tensor:
    return tensor.detach().contiguous().view(torch.uint8 if tensor.dtype == torch.bool else torch.int16)


def drawn(data: st.DataObject, size: int, dtype: torch.dtype, values: list[float]) -> Tensor:
    numbers = data.draw(st.lists(st.sampled_from(values), min_size=size, max_size=size))
    return torch.tensor(numbers, dtype=torch.float64).to(dtype)


def large_layers(
    dtype: torch.dtype, *, ties: bool, sizes: tuple[int, ...] = (300_001, 70_000)
) -> list[LayerTensors]:
    seed = torch.Generator().manual_seed(1)
    layers = []
    for size in sizes:
        values, gradient = (torch.randn(size, generator=seed, dtype=torch.float64) for _ in range(2))
        if ties:
            values, gradient = (values * 4).round(), (gradient * 4).round()
        mask = torch.rand(size, generator=seed) < 0.1
        layers.append(layer_of((values * mask).to(dtype), mask, gradient.to(dtype)))
    return layers
