"""Device memory that is read on other streams than it was made on, or by CUDA graphs. No GPU: streams are
numbers here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseopt_kernels.kernels.gpu import device
from sparseopt_kernels.kernels.gpu.device import Shared

CUDA = torch.device("cuda")


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The current one, of which ``number`` can be set."""
    current = SimpleNamespace(number=7)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=current.number)
    )
    return current


def test_other_streams_are_told_of_once(stream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(
        Tensor, "record_stream", lambda tensor, used_on: told.append((tensor.numel(), used_on.cuda_stream))
    )
    shared = Shared([torch.zeros(2), torch.zeros(3)], CUDA)
    for number in (7, 7, 8, 8, 7, 9, 8):
        stream.number = number
        shared.use(device.current_stream(CUDA))
    assert told == [(n, number) for number in (7, 8, 9) for n in (2, 3)]


def test_the_current_stream_is_a_number(stream: Any) -> None:
    assert device.current_stream(CUDA) == 7
    assert device.current_stream(torch.device("cpu")) == 0
