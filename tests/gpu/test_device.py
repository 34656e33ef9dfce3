"""Devices as GPU backends need them, and memory that is read on other streams than it was made on, or by CUDA
graphs. No GPU: streams are numbers here."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseopt_kernels.kernels.gpu import device
from sparseopt_kernels.kernels.gpu.device import Shared

CPU, CUDA, SECOND = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)
XPU = torch.device("xpu", 0)


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The current one of the first device, of which ``number`` can be set. That of the second is 77."""
    current = SimpleNamespace(number=7)
    monkeypatch.setattr(
        torch.cuda,
        "current_stream",
        lambda device: SimpleNamespace(cuda_stream=77 if device == SECOND else current.number),
    )
    return current


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """How large the tensors are, and on which stream they are used, that the allocator is told of."""
    noted: list[tuple[int, int]] = []
    monkeypatch.setattr(
        Tensor, "record_stream", lambda tensor, used_on: noted.append((tensor.numel(), used_on.cuda_stream))
    )
    return noted


def test_other_streams_are_told_of_once(stream: Any, told: list[tuple[int, int]]) -> None:
    """0 is the default stream, which is one like any other."""
    shared = Shared([torch.zeros(2), torch.zeros(3)], CUDA)
    for number in (7, 7, 8, 8, 7, 0, 9, 0, 8):
        stream.number = number
        shared.use(device.current_stream(CUDA))
    assert told == [(n, number) for number in (7, 8, 0, 9) for n in (2, 3)]


def test_the_stream_that_is_told_of_is_that_of_the_memory(stream: Any, told: list[tuple[int, int]]) -> None:
    """Whichever device is current."""
    Shared([torch.zeros(2)], SECOND).use(device.current_stream(SECOND))
    assert told == [(2, 77)]


def test_the_current_stream_is_a_number(stream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.xpu, "current_stream", lambda device: SimpleNamespace(sycl_queue=5))
    current = {place: device.current_stream(place) for place in (CUDA, SECOND, XPU, CPU)}
    assert current == {CUDA: 7, SECOND: 77, XPU: 5, CPU: 0}


def test_a_guard_makes_a_device_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """``with torch.device(...)`` would not: it is where tensors are made."""
    made_current: list[torch.device] = []

    def guard(place: torch.device) -> nullcontext[None]:
        made_current.append(place)
        return nullcontext()

    for module in (torch.cuda, torch.xpu):
        monkeypatch.setattr(module, "device", guard)
    for place in (SECOND, XPU, CPU):
        with device.device_guard(place):
            pass
    assert made_current == [SECOND, XPU]


def test_multiprocessors_are_those_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    of_cuda = {CUDA: 132, SECOND: 108}
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda place: SimpleNamespace(multi_processor_count=of_cuda[place]),
    )
    monkeypatch.setattr(
        torch.xpu, "get_device_properties", lambda place: SimpleNamespace(max_compute_units=64)
    )
    device.multiprocessors.cache_clear()
    try:
        assert [device.multiprocessors(place) for place in (CUDA, SECOND, XPU, CPU)] == [132, 108, 64, 1]
    finally:
        device.multiprocessors.cache_clear()


@pytest.mark.parametrize("is_captured", [True, False])
def test_a_capture_is_seen(is_captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_captured)
    assert device.capturing() == is_captured


def test_that_a_graph_is_captured_is_not_asked_of_a_driver_that_sleeps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A process that uses no GPU is not to start one, which takes seconds and cannot be undone in forks."""
    never: Callable[[], bool] = lambda: pytest.fail("it is asked")  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", never)
    assert not device.capturing()
