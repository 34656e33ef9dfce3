"""``min_fan_in`` and dropping alone by the native library, against PyTorch's, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from update_pairs import DTYPES, SPECIAL, compare, copy_of, drawn, each_dtype, large_layers, layer_of

from sparseopt_kernels.kernels import cpu as native
from sparseopt_kernels.neurons import Neurons
from sparseopt_kernels.topology.drop_and_grow import Change, Ranking, TorchDropAndGrow
from sparseopt_kernels.topology.hooks import Counts
from sparseopt_kernels.topology.native_drop_and_grow import NativeDropAndGrow, supports
from sparseopt_kernels.topology.selection import missing_inputs

REASON = native.CPU.unavailable(torch.device("cpu"))
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"backend 'cpu': {REASON}")


@settings(max_examples=300, deadline=None)
@given(
    data=st.data(),
    shape=st.sampled_from([(5, 9), (1, 70), (40, 3), (4, 6, 3), (6, 4, 1, 2), (3, 130), (2, 0)]),
    dtype=st.sampled_from(DTYPES),
    min_fan_in=st.sampled_from([1, 2, 3]),
)
def test_min_fan_in(data: st.DataObject, shape: tuple[int, ...], dtype: torch.dtype, min_fan_in: int) -> None:
    neurons = data.draw(st.sampled_from([Neurons(), Neurons(1), Neurons(1, groups=2)]))
    if shape[0] % neurons.groups:
        neurons = Neurons(1)
    groups, segments, per_group, length = neurons.grid(shape)
    needed = groups * per_group * min(min_fan_in, segments * length)
    min_fan_in = min(min_fan_in, segments * length)
    size = math.prod(shape)
    palette = data.draw(st.sampled_from([SPECIAL, SPECIAL[:1], SPECIAL[2:7], [float(i) for i in range(40)]]))
    count = data.draw(st.integers(needed, size))
    mask = torch.zeros(size, dtype=torch.bool)
    if data.draw(st.booleans()):
        mask[:count] = True  # neurons that have all, and neurons that have nothing
    else:
        mask[data.draw(st.permutations(range(size)))[:count]] = True
    values, gradient = drawn(data, size, dtype, palette), drawn(data, size, dtype, palette)
    layer = layer_of(values.view(shape), mask.view(shape), gradient.view(shape))
    missing = missing_inputs(layer.mask, min_fan_in, neurons)
    k = data.draw(st.integers(missing, count))
    for grow in ("largest", "random"):
        (found,) = compare([layer], [k], grow, min_fan_in=min_fan_in, neurons=[neurons])
        if k > 0:
            assert missing_inputs(found.mask, min_fan_in, neurons) == 0


@each_dtype
@pytest.mark.parametrize("ties", [False, True], ids=["normal", "ties"])
@pytest.mark.parametrize("neurons", [Neurons(), Neurons(1, groups=3)], ids=["dim 0", "dim 1"])
def test_min_fan_in_of_large_layers(dtype: torch.dtype, ties: bool, neurons: Neurons) -> None:
    (layer,) = large_layers(dtype, ties=ties, sizes=(300_000,))
    layer = layer_of(layer.parameter.detach().view(300, 1000), layer.mask.view(300, 1000), None)
    layer.parameter.grad = torch.randn(300, 1000, generator=torch.Generator().manual_seed(3)).to(dtype)
    layer.mask[7] = False  # a neuron, or one weight of many
    layer.mask[:, 5] = False
    count = int(layer.mask.sum())
    for min_fan_in in (1, 9):
        for k in (3000, count):
            for threads, grow in ((1, "largest"), (3, "largest"), (2, "random")):
                compare([layer], [k], grow, threads, min_fan_in=min_fan_in, neurons=[neurons])


@pytest.mark.parametrize("corrected", [False, True])
def test_a_dead_neuron_is_filled_by_its_gradient(corrected: bool) -> None:
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[:2] = True
    gradient = torch.arange(24.0).view(4, 6)
    factors = torch.tensor([[2.0], [2.0], [0.0], [0.0]]) if corrected else None
    layer = layer_of(torch.randn(4, 6), mask, gradient)
    found = []
    for make in (NativeDropAndGrow, TorchDropAndGrow):
        own = copy_of(layer)
        with torch.no_grad():
            updates = make([own], [Neurons()], 1)
            assert updates.missing == [2]
            updates.rank([Ranking(0, gradient, at_most=2, factors=factors)])
            updates.update([Change(Counts(2, 2))])
        found.append(own.mask)
    assert found[0][2:].nonzero().tolist() == [[0, 5], [1, 5]]
    assert torch.equal(*found)


@each_dtype
@pytest.mark.parametrize("min_fan_in", [0, 1, 3])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_dropping_alone(dtype: torch.dtype, min_fan_in: int, mask_dtype: torch.dtype) -> None:
    seed = torch.Generator().manual_seed(0)
    mask = (torch.rand(30, 40, generator=seed) < 0.3).to(mask_dtype)
    values = torch.randint(-3, 4, mask.shape, generator=seed).to(dtype)
    for k in (0, 5, 200, int(mask.count_nonzero())):
        layers = [layer_of(values.clone(), mask.clone(), None) for _ in range(2)]
        layers = [layer._replace(explored=mask != 0) for layer in layers]
        assert supports(layers[:1])
        (update,) = NativeDropAndGrow(layers[:1], [Neurons()], min_fan_in).update([Change(Counts(k))])
        assert [update] == TorchDropAndGrow(layers[1:], [Neurons()], min_fan_in).update([Change(Counts(k))])
        assert (update.changed, update.grown, update.revived) == (k > 0, 0, 0)
        for native_tensor, expected in zip(*layers, strict=True):
            assert native_tensor.dtype == expected.dtype
            assert torch.equal(native_tensor, expected)
        left = layers[0].mask
        assert not layers[0].parameter[(left == 0) & (mask != 0)].any()
        if k < 200 or min_fan_in == 0:
            assert left.count_nonzero() == mask.count_nonzero() - k
