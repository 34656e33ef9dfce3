"""GPUs that need not be here, as the host sees them: the device and the stream on which the GPU backends
launch each kernel, where Triton loads it, and the memory that the allocator is told of. Tensors are those of
the CPU, and no kernel runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from backends import emulate
from torch import Tensor

from sparseopt_kernels.kernels.gpu import cuda, plan, triton
from sparseopt_kernels.kernels.gpu import device as device_module

HERE, ELSEWHERE = torch.device("cpu"), torch.device("cuda", 5)
"""The device of all tensors, and the one that is current unless a guard makes another one so."""


class Launched(NamedTuple):
    kernel: str
    programs: int
    device: torch.device
    stream: int


class Gpus:
    """What has happened so far, and how the devices are."""

    def __init__(self) -> None:
        self.current = ELSEWHERE
        self.streams = {HERE: 7, ELSEWHERE: 99}
        self.multiprocessors, self.registers = 1, 64  # registers: of each kernel
        self.launches: list[Launched] = []
        self.loads: list[tuple[str, torch.device]] = []
        self.recorded: set[tuple[int, int]] = set()  # addresses, and streams that read there

    @contextmanager
    def guard(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device
        try:
            yield
        finally:
            self.current = before

    def stream_of(self, device: torch.device) -> int:
        return self.streams[device]

    def note(self, kernel: str, programs: int, stream: int) -> None:
        self.launches.append(Launched(kernel, programs, self.current, stream))


def pretend(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    """Let both GPU backends take CPU tensors, and note what they ask of devices."""
    pytest.importorskip("triton")
    gpus = Gpus()
    for module in (device_module, plan):
        monkeypatch.setattr(module, "device_guard", gpus.guard)
    for module in (plan, cuda):
        monkeypatch.setattr(module, "current_stream", gpus.stream_of)
    for module in (triton, cuda):
        monkeypatch.setattr(module, "multiprocessors", lambda device: gpus.multiprocessors)
    monkeypatch.setattr(torch, "cpu", SimpleNamespace(current_stream=gpus.stream_of))
    monkeypatch.setattr(
        Tensor, "record_stream", lambda tensor, stream: gpus.recorded.add((tensor.data_ptr(), stream))
    )
    _pretend_triton(gpus, monkeypatch)
    emulate(_library(gpus), monkeypatch)
    return gpus


def _pretend_triton(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own compiled kernel chooses the stream; nothing is compiled, and what it would call notes."""
    from triton.compiler import CompiledKernel
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Kernel(CompiledKernel):  # type: ignore[misc]
        def __init__(self, name: str, arguments: Sequence[Any], constants: dict[str, Any]) -> None:
            self.name, self.arguments, self.constants = name, arguments, constants
            self.loaded_on: torch.device | None = None
            self.module = self.function = self.packed_metadata = None  # of the base class

        def _init_handles(self) -> None:
            """Load it, which is when its registers are known."""
            if self.loaded_on is None:
                self.loaded_on, self.n_regs = gpus.current, gpus.registers
                gpus.loads.append((self.name, gpus.current))

        def launch_metadata(self, *_: Any) -> None:
            return None

        @property
        def run(self) -> Callable[..., None]:
            return self._noted

        def _noted(self, x: int, y: int, z: int, stream: int, *rest: Any) -> None:
            assert gpus.current == self.loaded_on, "it was loaded on another device"
            count = len(self.arguments)
            arguments = rest[len(rest) - count - len(self.constants) :]
            assert kinds(arguments[:count]) == kinds(self.arguments), "it was compiled for other arguments"
            assert arguments[count:] == (*self.constants.values(),), "it was compiled for other constants"
            assert (y, z) == (1, 1)
            gpus.note(self.name, x, stream)

    def warmup(kernel: Any, *arguments: Any, grid: tuple[int, ...], **constants: Any) -> Kernel:
        constants = {name: value for name, value in constants.items() if name not in triton._OPTIONS}
        return Kernel(kernel.__name__, arguments, constants)

    active = SimpleNamespace(get_current_device=lambda: gpus.current, get_current_stream=gpus.stream_of)
    monkeypatch.setattr(driver, "_active", active)
    monkeypatch.setattr(JITFunction, "warmup", warmup)
    monkeypatch.setattr(triton, "LOADED", {})
    monkeypatch.setattr(triton.TRITON, "unavailable", lambda device: None)


def kinds(arguments: Sequence[Any]) -> list[Any]:
    """What Triton compiles a kernel for: the types of its arguments, and how many a tuple has."""
    return [len(x) if isinstance(x, tuple) else type(x) for x in arguments]


def _library(gpus: Gpus) -> Any:
    """The CUDA library: of each function, the last argument is the stream."""

    def noted(name: str, programs: Callable[[Sequence[Any]], int]) -> Callable[..., None]:
        return lambda *arguments: gpus.note(name, programs(arguments), arguments[-1])

    return SimpleNamespace(
        SectorLaunch=lambda **fields: SimpleNamespace(blocks=fields["most_chunks"], **fields),
        step_rows=lambda columns: 8,
        count_rows=noted("count_rows", lambda arguments: arguments[-2]),
        list_sectors=noted("list_sectors", lambda arguments: arguments[-2]),
        masked_step=noted("masked_step", lambda arguments: arguments[3]),
        sector_step=noted("sector_step", lambda arguments: arguments[0].blocks),
        sector_squares=noted("sector_squares", lambda arguments: arguments[0].blocks),
    )
