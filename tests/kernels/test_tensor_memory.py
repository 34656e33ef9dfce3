"""Where tensors lie: the native reader and the one in Python tell the same tensors apart."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parameter import Parameter, UninitializedParameter

from sparseopt_kernels.kernels import tensor_memory
from sparseopt_kernels.kernels.tensor_memory import Memory, memory_of

Reader = Callable[[Sequence[Tensor | None]], Memory | None]


class Subclass(Tensor):
    pass


@pytest.fixture(params=["native", "python"])
def reader(request: pytest.FixtureRequest) -> Reader:
    if request.param == "python":
        return tensor_memory._read
    if tensor_memory.READER is None:
        pytest.skip("the native library was not built, or this PyTorch has no exchange API of DLPack")
    native = tensor_memory.READER

    def read(tensors: Sequence[Tensor | None]) -> Memory | None:
        found = native.read(tensors)
        return None if found is None else Memory(*found)

    return read


T = torch.arange(36.0).view(6, 6)
OTHER = torch.zeros(6, 6)
EMPTY = torch.zeros(0, 6)
NUMBER = torch.ones(())
CHANNELS_LAST = torch.zeros(2, 2, 3, 3).to(memory_format=torch.channels_last)
# Two lists of tensors, whether their layouts are equal, and whether their addresses are.
PAIRS: dict[str, tuple[list[Tensor | None], list[Tensor | None], bool, bool]] = {
    "the-same": ([T], [T], True, True),
    "a-view-of-all": ([T], [T.view(6, 6)], True, True),
    "a-parameter": ([T], [Parameter(T)], True, True),
    "requires-grad": ([T], [T.detach().requires_grad_()], True, True),
    "nothing": ([], [], True, True),
    "no-tensor": ([None], [None], True, True),
    "a-number": ([NUMBER], [NUMBER.view(())], True, True),
    "no-elements": ([EMPTY], [torch.zeros(0, 6)], True, True),
    "gaps": ([T[:, ::2]], [T[:, ::2]], True, True),
    "channels-last": ([CHANNELS_LAST], [CHANNELS_LAST.detach()], True, True),
    "elsewhere": ([T], [OTHER], True, False),
    "an-offset": ([T[:5]], [T[1:]], True, False),
    "gaps-at-an-offset": ([T[:, ::2]], [T[:, 1::2]], True, False),
    "exchanged": ([T, OTHER], [OTHER, T], True, False),
    "a-number-elsewhere": ([NUMBER], [torch.ones(())], True, False),
    "dtype": ([T], [T.view(torch.int32)], False, True),
    "half-precisions": ([T.view(torch.bfloat16)], [T.view(torch.float16)], False, True),
    "bool-and-uint8": ([T.view(torch.uint8)], [T.view(torch.uint8).view(torch.bool)], False, True),
    "complex": ([T], [T.view(torch.complex64)], False, True),
    "fewer-rows": ([T], [T[:4]], False, True),
    "other-shape": ([T], [T.view(4, 9)], False, True),
    "one-dimension-more": ([T], [T.view(1, 6, 6)], False, True),
    "a-number-and-a-vector": ([T[0, 0]], [T[0, :1]], False, True),
    "transposed": ([T], [T.t()], False, True),
    "channels-last-and-contiguous": (
        [CHANNELS_LAST],
        [CHANNELS_LAST.as_strided((2, 2, 3, 3), (18, 9, 3, 1))],
        False,
        True,
    ),
    "other-gaps": ([T[:, ::2]], [T[:, :3]], False, True),
    "expanded": ([T[:1].expand(6, 6)], [T], False, True),
    "no-rows-and-no-columns": ([EMPTY], [torch.zeros(6, 0)], False, True),
    "present-and-absent": ([T], [None], False, False),
    "one-more": ([T], [T, OTHER], False, False),
    "one-more-that-is-absent": ([T], [T, None], False, False),
    "absent-in-another-place": ([None, T], [T, None], False, False),
    "absent-in-another-place-of-three": ([None, T, OTHER], [T, None, OTHER], False, False),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_what_is_equal_and_what_differs(reader: Reader, pair: str) -> None:
    left, right, same_layout, same_addresses = PAIRS[pair]
    a, b = reader(left), reader(right)
    assert a is not None
    assert b is not None
    assert (a.layout == b.layout) == same_layout
    assert (a.addresses == b.addresses) == same_addresses
    assert (a == b) == (same_layout and same_addresses)


def test_addresses(reader: Reader) -> None:
    tensors = [None, T[2:], Parameter(OTHER), EMPTY, T.t(), T[:, 1::2], NUMBER, None]
    memory = reader(tensors)
    assert memory is not None
    want = array("Q", [0 if t is None else t.data_ptr() for t in tensors])
    assert memory.addresses == want.tobytes()


def test_a_tensor_that_moves_in_place(reader: Reader) -> None:
    """As ``model.to()`` does it: the same object, other memory."""
    p = Parameter(torch.zeros(3))
    before = reader([p])
    former, p.data = p.data, torch.zeros(3)
    assert before is not None
    assert reader([p]) == Memory(before.layout, array("Q", [p.data_ptr()]).tobytes())
    assert former.data_ptr() != p.data_ptr()


def test_nothing_is_held(reader: Reader) -> None:
    t = torch.zeros(3)
    before = sys.getrefcount(t)
    memory = [reader([t]) for _ in range(10)]
    assert all(memory)
    assert sys.getrefcount(t) == before


# What DLPack has no word for is read all the same, by the reader in Python.
UNKNOWN_TO_DLPACK: dict[str, Callable[[], Tensor]] = {
    "subclass": lambda: torch.zeros(3).as_subclass(Subclass),
    "meta": lambda: torch.zeros(3, device="meta"),
    "sparse": lambda: torch.zeros(3).to_sparse(),
    "lazy": UninitializedParameter,
}


@pytest.mark.parametrize("kind", UNKNOWN_TO_DLPACK)
def test_what_dlpack_does_not_know(kind: str) -> None:
    tensor = UNKNOWN_TO_DLPACK[kind]()
    if tensor_memory.READER is not None:
        assert tensor_memory.READER.read([T, tensor]) is None
    memory = memory_of([T, tensor])
    assert memory == memory_of([T, tensor])
    address = tensor.data_ptr() if kind in ("subclass", "meta") else 0
    assert memory.addresses == array("Q", [T.data_ptr(), address]).tobytes()
    assert memory.layout != memory_of([T, torch.zeros(2)]).layout
    if kind == "subclass":
        assert memory != memory_of([T, torch.zeros(3).as_subclass(Subclass)])


@pytest.mark.parametrize("thing", [3, "mask", [T], object()], ids=["int", "str", "list", "object"])
def test_what_is_no_tensor(thing: Any) -> None:
    if tensor_memory.READER is not None:
        assert tensor_memory.READER.read([T, thing]) is None
    with pytest.raises(AttributeError):
        memory_of([T, thing])


def test_an_error_of_the_reader_is_not_left_behind() -> None:
    """What it cannot read raises inside PyTorch: the next call must not find that error."""
    if tensor_memory.READER is None:
        pytest.skip("the native library was not built, or this PyTorch has no exchange API of DLPack")
    for _ in range(3):
        assert tensor_memory.READER.read((T.to_sparse(),)) is None
        assert tensor_memory.READER.read([T]) is not None


@pytest.mark.parametrize("api", [object(), 3, None], ids=["object", "int", "none"])
def test_an_interface_that_the_reader_does_not_know(monkeypatch: pytest.MonkeyPatch, api: object) -> None:
    """Another release of PyTorch may have another: tensors are read in Python then."""
    monkeypatch.setattr(Tensor, "__dlpack_c_exchange_api__", api, raising=False)
    assert tensor_memory._reader() is None
