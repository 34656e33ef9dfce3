"""Parameters that share memory are updated one after the other, as by ``torch.optim.SGD(foreach=False)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import Backend
from side_by_side import same_bits
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from sparseopt_kernels.optimizer import SparseOpt
from sparseopt_kernels.step.overlap import sharing_pairs, turns_of

SIZE = 300  # large enough for two threads


def tied(how: str) -> tuple[Parameter, Parameter]:
    generator = torch.Generator().manual_seed(0)
    a = Parameter(torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64))
    if how == "same":
        return a, Parameter(a.data)
    if how == "transposed":
        return a, Parameter(a.data.t())
    if how == "part":
        return a, Parameter(a.data[10:20])
    memory = torch.randn(2 * SIZE * SIZE, generator=generator, dtype=torch.float64)
    return Parameter(memory[: SIZE * SIZE].view(SIZE, SIZE)), Parameter(memory[100 : 100 + SIZE * SIZE])


def give_gradients(parameters: list[Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


each_tie = pytest.mark.parametrize("how", ["same", "transposed", "part", "shifted"])


@each_tie
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.same_bits_as_sgd
def test_as_the_for_loop_does_it(backend: Backend, how: str, threads: int) -> None:
    """To the last bit, momentum and weight decay included, between other parameters."""
    if backend.name in ("triton", "cuda"):
        pytest.skip("float64 bits are compared")
    torch.set_num_threads(threads)
    runs = []
    for make in (
        lambda params, **rule: SparseOpt(params, **rule, backend=backend.name),
        lambda params, **rule: torch.optim.SGD(params, **rule, foreach=False),
    ):
        a, b = tied(how)
        other = Parameter(torch.ones(5, 5, dtype=torch.float64))
        parameters = [b, other, a] if how == "part" else [a, other, b]
        optimizer = make(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)
        for step in range(6):
            give_gradients(parameters, step)
            optimizer.step()
        runs.append([a, b, other])
    assert all(same_bits(p, q) for p, q in zip(*runs, strict=True))


def _image(tie: str, mask: Tensor) -> Tensor:
    return {"same": lambda: mask.clone(), "transposed": lambda: mask.t().contiguous()}[tie]()


@pytest.mark.parametrize("how", ["same", "transposed"])
def test_equal_masks_on_the_same_memory(backend: Backend, how: str) -> None:
    a, b = tied(how)
    mask = torch.rand(SIZE, SIZE, generator=torch.Generator().manual_seed(1)) < 0.1
    optimizer = SparseOpt(
        [a, b], lr=0.1, momentum=0.9, masks={a: mask, b: _image(how, mask)}, backend=backend.name
    )
    for step in range(3):
        give_gradients([a, b], step)
        optimizer.step()
    assert not a[~mask].any()
    assert a[mask].all()


UNEQUAL: dict[str, Callable[[Parameter, Parameter, Tensor], dict[Parameter, Tensor]]] = {
    "one-bit": lambda a, b, mask: {a: mask, b: mask ^ (torch.arange(SIZE * SIZE).view(SIZE, SIZE) == 7)},
    "transposed": lambda a, b, mask: {a: mask, b: mask.t().contiguous()},
    "one-dense": lambda a, b, mask: {b: mask},
}


@pytest.mark.parametrize("kind", UNEQUAL)
def test_unequal_masks_on_the_same_memory_are_an_error(backend: Backend, kind: str) -> None:
    a, b = tied("same")
    mask = torch.rand(SIZE, SIZE, generator=torch.Generator().manual_seed(1)) < 0.1
    masks = UNEQUAL[kind](a, b, mask)
    optimizer = SparseOpt([("encoder", a), ("decoder", b)], lr=0.1, masks=masks, backend=backend.name)
    before = a.detach().clone()
    give_gradients([a, b], 0)
    with pytest.raises(
        ValueError, match="'encoder' and 'decoder' share memory, and their masks differ there"
    ):
        optimizer.step()
    assert same_bits(a, before)


@pytest.mark.parametrize("is_second_masked", [False, True])
def test_a_mask_and_another_dtype_on_the_same_memory_are_an_error(
    backend: Backend, is_second_masked: bool
) -> None:
    """A float64 is two of float32: whatever the masks, they are not of the same numbers."""
    a = Parameter(torch.ones(4, 4))
    b = Parameter(a.data.view(torch.float64))
    masks = {p: torch.ones(p.shape, dtype=torch.bool) for p in (a, b)[: 1 + is_second_masked]}
    optimizer = SparseOpt([("single", a), ("double", b)], lr=0.1, masks=masks, backend=backend.name)
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    with pytest.raises(ValueError, match="'single' and 'double' share memory"):
        optimizer.step()
    assert same_bits(a, torch.ones(4, 4))


def test_masks_that_become_unequal_are_an_error(backend: Backend) -> None:
    a, b = tied("part")
    mask = torch.rand(SIZE, SIZE, generator=torch.Generator().manual_seed(1)) < 0.1
    masks = {a: mask, b: mask[10:20].clone()}
    optimizer = SparseOpt([a, b], lr=0.1, masks=masks, backend=backend.name)
    give_gradients([a, b], 0)
    optimizer.step()
    masks[b].logical_not_()
    with pytest.raises(ValueError, match="share memory"):
        optimizer.step()


def test_the_tied_autoencoder_does_not_depend_on_threads() -> None:
    """``decoder.weight.data = encoder.weight.data.t()``: with two threads, results differed each time."""

    def trained(threads: int) -> list[Tensor]:
        torch.manual_seed(0)
        torch.set_num_threads(threads)
        encoder, decoder = nn.Linear(400, 300), nn.Linear(300, 400)
        decoder.weight.data = encoder.weight.data.t()
        parameters = [*encoder.parameters(), *decoder.parameters()]
        optimizer = SparseOpt(parameters, lr=0.1, momentum=0.9)
        for step in range(5):
            give_gradients(parameters, step)
            optimizer.step()
        return [p.detach() for p in parameters]

    assert all(same_bits(p, q) for p, q in zip(trained(1), trained(2), strict=True))


def _flat(*shapes: tuple[int, ...]) -> list[Tensor]:
    memory, parts, begin = torch.zeros(1000), [], 0
    for shape in shapes:
        count = int(torch.tensor(shape).prod())
        parts.append(memory[begin : begin + count].view(shape))
        begin += count
    return parts


@pytest.mark.parametrize(
    ("tensors", "turns"),
    [
        ([torch.zeros(3), torch.zeros(3)], [0, 0]),
        (_flat((3, 4), (5,), (7, 2)), [0, 0, 0]),  # neighbours in one buffer, as FSDP1 or LBFGS makes them
        ([], []),
        ([torch.zeros(0), torch.zeros(0, 4)], [0, 0]),
        ([torch.zeros(2, 3, device="meta"), torch.zeros(2, 3, device="meta")], [0, 0]),
    ],
    ids=["two", "flat", "none", "empty", "meta"],
)
def test_what_does_not_overlap_has_one_turn(tensors: list[Tensor], turns: list[int]) -> None:
    assert turns_of(len(tensors), sharing_pairs(tensors)) == turns


def test_turns() -> None:
    memory: Any = torch.zeros(100)
    other = torch.zeros(4)
    tensors = [memory[50:], other, memory[:60], memory, other[1:]]
    assert turns_of(5, sharing_pairs(tensors)) == [0, 0, 1, 2, 1]
