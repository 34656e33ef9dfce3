"""Tensors however they lie in memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from backends import Backend
from side_by_side import same_bits
from torch import Tensor
from torch.nn.parameter import Parameter
from watched import Watched, each_float, optimizer_of, randn, random_mask

from sparseopt_kernels.optimizer import SparseOpt


def transposed(t: Tensor) -> Tensor:
    """The same values with the order of the dimensions reversed in memory."""
    return t.permute(*reversed(range(t.ndim))).contiguous().permute(*reversed(range(t.ndim)))


def with_gaps(t: Tensor) -> Tensor:
    """The same values, every other place in memory, NaN between them."""
    wide = torch.empty(*t.shape, 2, dtype=t.dtype)
    wide.fill_(True if t.dtype == torch.bool else torch.nan)
    wide[..., 0] = t
    return wide[..., 0]


def off_by_one(t: Tensor) -> Tensor:
    """The same values at an address that no vector is aligned to, inside a larger buffer."""
    whole = torch.ones(t.numel() + 7, dtype=t.dtype)
    whole[3 : 3 + t.numel()] = t.reshape(-1)
    return whole[3 : 3 + t.numel()].view(t.shape)


FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.clone,
    "channels-last": lambda t: t.clone(memory_format=torch.channels_last),
    "transposed": transposed,
    "gaps": with_gaps,
    "unaligned": off_by_one,
}


@pytest.mark.parametrize("pattern", [None, "half", "sparse99"], ids=str)
@pytest.mark.parametrize("grad_format", FORMATS)
@pytest.mark.parametrize("format", FORMATS)
def test_memory_formats(backend: Backend, format: str, grad_format: str, pattern: str | None) -> None:
    """Parameter and gradient in any two formats, the mask in a third, a buffer loaded in a fourth."""
    shape = (9, 6, 5, 7)
    parameter = Parameter(FORMATS[format](randn(shape)))
    assert parameter.stride() == FORMATS[format](randn(shape)).stride()
    mask = None if pattern is None else random_mask(shape, pattern=pattern)
    watched = Watched(backend, parameter, mask)
    for step in range(10):
        if mask is not None and pattern is not None and step % 3 == 1:
            mask_format = list(FORMATS.values())[step % len(FORMATS)]
            watched.masks[parameter] = mask_format(random_mask(shape, step, pattern))
        if step == 6:
            buffer = watched.optimizer.state[parameter]["momentum_buffer"]
            watched.optimizer.state[parameter]["momentum_buffer"] = transposed(buffer)
        watched.step(FORMATS[grad_format](randn(shape, seed=step)))


def test_gradients_in_another_format_each_step(backend: Backend) -> None:
    shape = (8, 4, 3, 3)
    watched = Watched(backend, Parameter(randn(shape)), random_mask(shape))
    formats = [torch.clone, *FORMATS.values()]  # the first two, that all is prepared for, are contiguous
    for step in range(12):
        watched.step(formats[step % len(formats)](randn(shape, seed=step)))


def test_expanded_gradient(backend: Backend) -> None:
    """A gradient with stride 0."""
    for mask in (None, random_mask((5, 33))):
        watched = Watched(backend, Parameter(randn((5, 33))), mask)
        for step in range(3):
            watched.step(randn((5, 1), seed=step).expand(5, 33))


@pytest.mark.parametrize("change", ["clone", "channels-last", "half-and-back", "bfloat16"])
def test_memory_that_moves_between_steps(backend: Backend, change: str) -> None:
    """``model.to()`` gives a parameter other memory without any sign but the address."""
    shape = (6, 5, 3, 3)
    parameter = Parameter(randn(shape, torch.float32))
    watched = Watched(backend, parameter, random_mask(shape))
    for step in range(3):
        watched.step(randn(shape, torch.float32, step))
    parameter.grad = None
    former = parameter.data
    parameter.data = {
        "clone": former.clone,
        "channels-last": lambda: former.clone(memory_format=torch.channels_last),
        "half-and-back": lambda: former.half().float(),
        "bfloat16": former.bfloat16,
    }[change]()
    before = former.clone()
    if change == "bfloat16":  # the buffer goes with it, as load_state_dict would cast it
        watched.optimizer.load_state_dict(watched.optimizer.state_dict())
    watched.resume()
    for step in range(3, 6):
        watched.step(randn(shape, parameter.dtype, step))
    assert same_bits(former, before), "the memory that the parameter has left was written"


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
def test_memory_read_in_another_order_between_steps(backend: Backend, masked: bool) -> None:
    """The same address and the same shape, other strides."""
    parameter = Parameter(randn((33, 33)))
    watched = Watched(backend, parameter, random_mask((33, 33)) if masked else None)
    for step in range(6):
        watched.step(randn((33, 33), seed=step))
        if step == 2:
            parameter.grad = None
            parameter.data = parameter.data.t()
            watched.resume()


def test_gaps_in_some_parameters_of_several(backend: Backend) -> None:
    """A backend may leave those to the reference: to each its own gradient, and one norm for all."""
    shape = (5, 33)
    formats = [FORMATS[name] for name in ("gaps", "contiguous", "gaps", "contiguous", "contiguous")]
    params = [Parameter(form(randn(shape, torch.float32, i))) for i, form in enumerate(formats)]
    others = [Parameter(p.detach().contiguous().clone()) for p in params]
    for own, name in ((params, backend.name), (others, "reference")):
        masks = {p: random_mask(shape, i) for i, p in enumerate(own[:2])}
        optimizer = SparseOpt(own, lr=0.1, momentum=0.9, max_grad_norm=1.0, masks=masks, backend=name)
        for step in range(3):
            for i, p in enumerate(own):
                p.grad = randn(shape, torch.float32, 10 * step + i)
            optimizer.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pattern", [None, "half", "sparse99", "tail", "full"], ids=str)
@each_float
def test_nothing_is_written_beside_a_tensor(
    backend: Backend, dtype: torch.dtype, pattern: str | None
) -> None:
    """Parameters, buffers and gradients that are views of one flat buffer, as sharded training has them:
    what lies before, between and behind them stays as it is."""
    shape, gap = (7, 37), 5
    size = shape[0] * shape[1]

    def place(flat: Tensor, i: int) -> Tensor:
        start = gap + i * (size + gap)
        return flat[start : start + size].view(shape)

    flats = [randn((3 * (size + gap) + gap,), dtype, seed) for seed in range(3)]
    before = [flat.clone() for flat in flats]
    params = [Parameter(place(flats[0], i)) for i in range(3)]
    masks = {} if pattern is None else {p: random_mask(shape, i, pattern) for i, p in enumerate(params)}
    optimizer = optimizer_of(backend, params, masks)
    for i, p in enumerate(params):
        p.grad = place(flats[1], i)
        optimizer.state[p]["momentum_buffer"] = place(flats[2], i)
    for _ in range(3):
        optimizer.step()
    inside = torch.zeros(flats[0].shape, dtype=torch.bool)
    for i in range(3):
        place(inside, i).fill_(True)
    assert same_bits(flats[1], before[1])
    for flat, former in zip(flats, before, strict=True):
        assert same_bits(flat[~inside], former[~inside])
    assert not torch.equal(flats[0], before[0])
    if pattern != "full" and pattern is not None:
        for p, mask in masks.items():
            assert not p[~mask].any()
