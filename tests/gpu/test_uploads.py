"""What is copied to a device: from pinned memory, without waiting, and in a graph from memory that stays. No
GPU: what is pinned is noted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparseopt_kernels.kernels.gpu import device

CPU = torch.device("cpu")


class Copies(TorchDispatchMode):
    """Notes what is copied from, and whether that waits."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[int] = []
        self.waits: list[bool] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.overloadpacket.__name__ == "copy_":
            self.sources.append(args[1].data_ptr())
            self.waits.append(not kwargs.get("non_blocking", args[2] if len(args) > 2 else False))
        return function(*args, **kwargs)


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """All memory that was pinned, of which there is none at the start. Each device needs it."""
    noted: list[Tensor] = []

    def pin(memory: Tensor) -> Tensor:
        noted.append(memory)
        return memory

    monkeypatch.setattr(device, "_needs_pinning", lambda device: True)
    monkeypatch.setattr(device, "_staging", {})
    monkeypatch.setattr(device, "_wanted", {})
    monkeypatch.setattr(device, "_LEAST_STAGING", 0)
    monkeypatch.setattr(device, "_pinned", lambda nbytes: pin(torch.empty(nbytes, dtype=torch.uint8)))
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: pin(tensor.clone()))
    return noted


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What is kept for the graph that is captured from now on."""
    kept: list[object] = []
    monkeypatch.setattr(device, "_read_by_graphs", kept)
    monkeypatch.setattr(device, "capturing", lambda: True)
    return kept


def test_an_upload_is_from_pinned_memory_and_does_not_wait(pinned: list[Tensor]) -> None:
    """From other memory, CUDA copies only once the host waits for it."""
    values = torch.arange(5)
    with Copies() as copies:
        copied = device.upload(values, CPU)
    (source,) = pinned
    assert copies.sources == [source.data_ptr()]
    assert copies.waits == [False]
    assert torch.equal(copied, values)


def test_pinned_memory_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "empty", lambda *size, **options: asked.append(options))
    device._pinned(16)
    assert [options["pin_memory"] for options in asked] == [True]


def test_what_a_graph_copies_from_is_kept(pinned: list[Tensor], graphs: list[object]) -> None:
    """It is read whenever the graph is replayed, long after other memory was pinned."""
    device._staging[CPU] = torch.empty(64, dtype=torch.uint8)
    with Copies() as copies:
        device.upload(torch.arange(3), CPU)
    kept = [memory for memory in graphs if isinstance(memory, Tensor)]
    assert [memory.data_ptr() for memory in kept] == [copies.sources[-1]]
    assert kept[0].tolist() == [0, 1, 2]


def test_what_graphs_copy_from_is_aligned(pinned: list[Tensor], graphs: list[object]) -> None:
    """Whatever was copied before: here, 12 bytes."""
    device._staging[CPU] = torch.empty(96, dtype=torch.uint8)
    first = device.upload(torch.tensor([1, 2, 3], dtype=torch.int32), CPU)
    second = device.upload(torch.tensor([4, 5]), CPU)
    assert (first.tolist(), second.tolist()) == ([1, 2, 3], [4, 5])
    places = [memory.data_ptr() for memory in graphs if isinstance(memory, Tensor)]
    assert len(places) == 2
    assert all(place % 16 == places[0] % 16 for place in places)


class Owner:
    """Whose uploads memory is pinned for: a plan."""


def test_each_device_has_pinned_memory(pinned: list[Tensor]) -> None:
    owner = Owner()
    for number in range(2):
        device.reserve_staging(owner, 1000, torch.device("cuda", number))
    assert [memory.numel() for memory in pinned] == [1000, 1000]
    assert len(device._staging) == 2


def test_memory_is_pinned_for_owners_that_live(pinned: list[Tensor]) -> None:
    """Plans are made anew when masks change: those that are gone want none, and are not kept."""
    for _ in range(5):
        owner = Owner()
        device.reserve_staging(owner, 1000, CPU)
        del owner
    other = Owner()
    device.reserve_staging(other, 1000, CPU)
    assert [memory.numel() for memory in pinned] == [1000]
