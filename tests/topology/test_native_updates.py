"""Updates of masks by the native library, against PyTorch's, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_model import assert_same, make_model, masks_of
from method_seeds import seeded
from torch import Tensor, nn
from update_pairs import DTYPES, SPECIAL, compare, drawn, each_dtype, large_layers, layer_of, update

from sparseopt_kernels import native_library
from sparseopt_kernels.kernels import cpu as native
from sparseopt_kernels.neurons import Neurons
from sparseopt_kernels.topology import update_plan
from sparseopt_kernels.topology.drop_and_grow import Change, LayerTensors, Ranking, TorchDropAndGrow
from sparseopt_kernels.topology.hooks import Counts
from sparseopt_kernels.topology.native_drop_and_grow import NativeDropAndGrow, supports
from sparseopt_kernels.topology.random_choice import random_places
from sparseopt_kernels.topology.rigl import RigL
from sparseopt_kernels.topology.set import SET
from sparseopt_kernels.topology.sparsify import sparsify

REASON = native.CPU.unavailable(torch.device("cpu"))
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"backend 'cpu': {REASON}")


@settings(max_examples=300, deadline=None)
@given(data=st.data(), size=st.integers(1, 200), dtype=st.sampled_from(DTYPES))
def test_special_values_and_ties(data: st.DataObject, size: int, dtype: torch.dtype) -> None:
    palette = data.draw(st.sampled_from([SPECIAL, SPECIAL[:1], SPECIAL[:2], SPECIAL[2:7], SPECIAL[-3:]]))
    layers = []
    for own_size in (size, 0, 1 + size // 2):
        density = data.draw(st.sampled_from([0, 1, 2, 18, 20]))
        seed = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
        mask = torch.randint(20, (own_size,), generator=seed) < density
        values, gradient = drawn(data, own_size, dtype, palette), drawn(data, own_size, dtype, palette)
        explored = mask | (torch.randint(5, (own_size,), generator=seed) == 0)
        layers.append(layer_of(values, mask, gradient)._replace(explored=explored))
    for grow in ("largest", "random"):
        k = [data.draw(st.integers(0, int(layer.mask.sum()))) for layer in layers]
        compare(layers, k, grow)


@each_dtype
@pytest.mark.parametrize("ties", [False, True], ids=["normal", "ties"])
@pytest.mark.parametrize("grow", ["largest", "random"])
def test_large_layers_with_any_number_of_threads(dtype: torch.dtype, ties: bool, grow: str) -> None:
    layers = large_layers(dtype, ties=ties)
    for k in ([9000, 2100], [30, 0], [int(layer.mask.sum()) for layer in layers]):
        for threads in (1, 2, 5):
            compare(layers, k, grow, threads)


@pytest.mark.parametrize("density", [0.0001, 0.45, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("grow", ["largest", "random"])
def test_large_layers_of_any_density(density: float, grow: str) -> None:
    seed = torch.Generator().manual_seed(2)
    mask = torch.rand(20_000, generator=seed) < density
    layers = [layer_of(torch.randn(20_000, generator=seed), mask, torch.randn(20_000, generator=seed))]
    for share in (0.1, 0.7, 1.0):
        compare(layers, [int(share * int(mask.sum()))], grow)


def sampled_places(size: int, count: int) -> Tensor:
    """Where the library looks first: one place from each part of the layer."""
    part = size // count
    return torch.cat([i * part + random_places(0, i, 1, part) for i in range(count)])


def test_a_wrong_guess_does_no_harm() -> None:
    # Scores and weights that were sampled are not like the others: too few are found, then all are looked at.
    size = 200_000
    places = sampled_places(size, 1024)
    ((values, mask, explored),) = large_layers(torch.float32, ties=False, sizes=(size,))
    mask[places] = True
    weights = values.detach().masked_fill(mask, 5.0) + torch.arange(size) % 7
    weights[places] = 1e-3
    gradient = torch.arange(size).remainder(1009).float()
    gradient[(places + 1).clamp_max(size - 1)] = 1e6
    layer = layer_of(weights * mask, mask, gradient)._replace(explored=explored | mask)
    for grow in ("largest", "random"):
        compare([layer], [8000], grow)
    mask = mask.clone()
    mask[places] = False
    gradient[places] = 1e6
    compare([layer_of(weights * mask, mask, gradient)], [8000], "largest")


def test_only_what_is_to_be_written_is_written() -> None:
    size = 5000
    memory = [torch.full((size + 128,), 7, dtype=torch.uint8) for _ in range(2)]
    numbers = [torch.full((size + 128,), 7.0) for _ in range(2)]
    mask, explored = (m[64:-64].view(torch.bool) for m in memory)
    values, gradient = (n[64:-64] for n in numbers)
    for tensor in (mask, explored):
        tensor.copy_(torch.arange(size) % 10 == 0)
    values.copy_(torch.randn(size) * mask)
    gradient.normal_()
    layer = layer_of(values, mask, gradient)._replace(explored=explored)
    with torch.no_grad():
        update(NativeDropAndGrow([layer], [Neurons()]), [layer], [150], "largest")
    for whole in chain(memory, numbers):
        assert (whole[:64] == 7).all()
        assert (whole[-64:] == 7).all()
    assert layer.parameter.data_ptr() == values.data_ptr()
    assert int(mask.sum()) == 500


@pytest.mark.parametrize("seen", [True, False])
def test_what_the_user_left_outside_the_mask(seen: bool) -> None:
    """Weights outside both masks are left alone, what grows starts at 0, and the old mask is explored."""
    mask = torch.arange(400) % 4 == 0
    layer = layer_of(torch.full((400,), 3.0), mask, torch.arange(400.0))
    if not seen:
        layer = layer._replace(explored=torch.zeros(400, dtype=torch.bool))
    (found,) = compare([layer], [60], "largest")
    assert (found.parameter[found.mask & ~mask] == 0).all()
    assert (found.parameter[~found.mask & ~mask] == 3).all()
    assert torch.equal(found.explored, found.mask | mask)


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "gaps": lambda t: torch.stack([t, t], dim=-1)[..., 0],
    "negated": lambda t: torch._neg_view(-t),
}


class TestLayouts:
    """ParamState that are not contiguous are copied; the order of places is the same."""

    def layer(
        self, form: Callable[[Tensor], Tensor], gradient_form: Callable[[Tensor], Tensor]
    ) -> LayerTensors:
        seed = torch.Generator().manual_seed(0)
        mask = torch.rand(8, 6, 3, 3, generator=seed) < 0.4
        values, gradient = (torch.randint(-3, 4, mask.shape, generator=seed).float() for _ in range(2))
        return layer_of(form(values * mask), form(mask), gradient_form(gradient))

    @pytest.mark.parametrize("gradient_form", FORMS)
    @pytest.mark.parametrize("form", [name for name in FORMS if name != "negated"])
    @pytest.mark.parametrize("grow", ["largest", "random"])
    @torch.no_grad()
    def test_they_do_not_matter(self, form: str, gradient_form: str, grow: str) -> None:
        plain = self.layer(FORMS["contiguous"], FORMS["contiguous"])
        (expected,) = compare([plain], [40], grow)
        layer = self.layer(FORMS[form], FORMS[gradient_form])
        versions = [layer.parameter._version, layer.mask._version]
        strides = layer.parameter.stride()
        assert supports([layer])
        update(NativeDropAndGrow([layer], [Neurons()]), [layer], [40], grow)
        assert all(torch.equal(*pair) for pair in zip(layer, expected, strict=True))
        assert layer.parameter.stride() == strides
        assert layer.parameter._version > versions[0]
        assert layer.mask._version > versions[1]


class TestWholeSteps:
    """``dst.step()`` and ``sparsify`` with the library and without."""

    def run(self, make: Callable[[Any], SET | RigL], dtype: torch.dtype) -> tuple[dict[str, Tensor], float]:
        torch.manual_seed(0)
        model = make_model()
        masks = sparsify(model, 0.8, seed=5)
        model.to(dtype)
        dst = make(masks)
        for step in range(5):
            for parameter in masks:
                parameter.grad = torch.randn(parameter.shape).to(dtype)
            if step == 1:
                next(iter(masks)).grad[0] = math.inf  # type: ignore[index]
            dst.step()
            with torch.no_grad():
                for parameter, mask in masks.items():
                    parameter.add_(torch.randn(parameter.shape).to(dtype) * mask)
        return {**model.state_dict(), **masks_of(model)}, dst.exploration_rate()

    @each_dtype
    @pytest.mark.parametrize("method", ["set", "original", "corrected"])
    def test_they_are_the_same(
        self, dtype: torch.dtype, method: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def make(masks: Any) -> SET | RigL:
            cls, options = (SET, seeded(SET, 2)) if method == "set" else (RigL, {"regrow": method})
            return cls(masks, 0.5, 2, stop_at=20, **options)

        with_library = self.run(make, dtype)
        used: list[TorchDropAndGrow] = []

        def torch_updates(*arguments: Any) -> TorchDropAndGrow:
            used.append(TorchDropAndGrow(*arguments))
            return used[-1]

        with monkeypatch.context() as patch:
            patch.setattr(native_library, "MISSING", "taken away for a test")
            patch.setattr(update_plan, "TorchDropAndGrow", torch_updates)
            without = self.run(make, dtype)
        assert len(used) == 3  # steps 2, 3 for the postponed one, and 4: it was really without
        assert_same(with_library[0], without[0])
        assert with_library[1] == without[1]


class Subclass(Tensor):
    pass


def test_what_is_not_supported() -> None:
    good = large_layers(torch.float32, ties=False, sizes=(60, 50))
    assert supports(good)
    parameter, mask, explored = good[0]
    other = nn.Parameter(torch.randn(60))
    bad = {
        "one mask of two parameters": [good[0], LayerTensors(other, mask, explored)],
        "dtype": [layer_of(torch.zeros(60, dtype=torch.complex64), mask, None)],
        "dtype of the gradient": [good[1], layer_of(torch.zeros(60, dtype=torch.complex64), mask, None)],
        "shape of the mask": [LayerTensors(parameter, mask[:30], explored)],
        "shape of what was explored": [LayerTensors(parameter, mask, explored[:30])],
        "dtype of the mask": [LayerTensors(parameter, mask.byte(), explored)],
        "subclass": [LayerTensors(parameter, mask.as_subclass(Subclass), explored)],
        "device": [LayerTensors(nn.Parameter(torch.zeros(60, device="meta")), mask, explored)],
        "no memory": [layer_of(torch.zeros(60), mask, torch._efficientzerotensor(60))],
        "layout": [layer_of(torch.zeros(6, 10), mask.view(6, 10), torch.zeros(6, 10).to_sparse())],
    }
    assert [name for name, layers in bad.items() if supports(layers)] == []


def test_bad_numbers_are_refused_before_anything_is_written() -> None:
    layer = large_layers(torch.float32, ties=False, sizes=(60,))[0]
    before = [tensor.detach().clone() for tensor in layer]
    active = int(layer.mask.sum())
    updates = NativeDropAndGrow([layer], [Neurons()])
    assert updates.active == [active]
    with pytest.raises(ValueError, match="k is larger than was told to rank"):
        updates.update([Change(Counts(1, 1))])
    gradient = layer.parameter.grad
    assert gradient is not None
    updates.rank([Ranking(0, gradient, at_most=60)])
    for k in (-1, active + 1):
        with pytest.raises(ValueError, match="k is out of range"):
            updates.update([Change(Counts(k, k))])
    with pytest.raises(ValueError, match="k is out of range"):
        updates.update([Change(Counts(0, 60 - active + 1))])
    with pytest.raises(ValueError, match="argument 2 is longer than argument 1"):
        updates.update([])
    with pytest.raises(ValueError, match="dtype is 'int8', it must be"):
        native_library.MaskedLayer(
            dtype="int8", weights=0, mask=0, explored=0, numel=0, min_fan_in=0, grid=(0, 0, 0, 0)
        )
    with pytest.raises(ValueError, match=r"k is out of range: it must be in \[0, size\]"):
        native_library.choose_random(0, 0, 1, 0)
    assert all(torch.equal(*pair) for pair in zip(before, layer, strict=True))
