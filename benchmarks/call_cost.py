"""The host's time for the call of a step, without the work of a GPU: ``python benchmarks/call_cost.py``.

It times a step of ResNet-50's 161 tensors by backend, with gradients at the same addresses, with gradients at
other addresses in every step, and with a limit of the norm, beside ``torch.optim.SGD(fused=True)``. CUDA
kernels and PyTorch's are stubs. Triton's are launched to a driver that does nothing (see ``stand_in_driver``)
if there is a C compiler, else they are stubs, too. Steps in which all masks are new are timed apart, because
they evict everything from the caches.

No GPU is needed. Tensors are on the CPU and have one row each, because only their number matters. The figures
leave out the host's time for the real driver, for pinning the memory that is copied to the GPU, for the
device guard, and for the query if a CUDA graph is being captured. Kernels compute nothing to be checked.

The backend "cpu" makes its steps, on one thread, in each of the three ways in which a step finds out what has
changed since the last one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import cycle
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import stand_in_driver
import torch
from networks import RESNET50
from torch import Tensor
from torch.nn.parameter import Parameter

from sparseopt_kernels import SparseOpt
from sparseopt_kernels.kernels.gpu import cuda, triton
from sparseopt_kernels.lab.timing import CpuTimer, Rounds, Turn, take_turns
from sparseopt_kernels.step import change_detection, factors, last_step
from sparseopt_kernels.text_table import aligned

_OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
_CUDA_LAUNCHES = ("count_rows", "list_sectors", "masked_step", "sector_step", "sector_squares")
_ROUNDS = Rounds(timed=400, warmup=40)


def main() -> int:
    torch.set_num_threads(1)
    with _stubs() as backends:
        turns, new = {}, {}
        for name, make in {**backends, "SGD fused": _sgd}.items():
            turns[name] = Turn(make(_parameters()).step)
            parameters = _parameters()
            turns[f"{name}, gradients move"] = Turn(make(parameters).step, _mover(parameters))
        turns |= _cpu_turns()
        for name, ours in backends.items():
            limited, renewed = ours(_parameters()), ours(_parameters())
            limited.param_groups[0]["max_grad_norm"] = 1.0
            turns[f"{name}, max_grad_norm"] = Turn(limited.step)
            new[f"{name}, masks new"] = Turn(renewed.step, _renewer(renewed))
        found = take_turns(turns, CpuTimer(), _ROUNDS)
        found |= take_turns(new, CpuTimer(), _ROUNDS)
    of_triton = "Triton's launched to nothing" if stand_in_driver.compiler() else "all"
    header = (f"161 tensors, kernels stubbed, {of_triton}: us", "p20", "p50", "p80")
    rows = [(name, *(f"{1e3 * ms:.0f}" for ms in summary[:3])) for name, summary in found.items()]
    print("\n".join(aligned([header, *rows])))
    return 0


def _parameters() -> list[Parameter]:
    """Return one row of each of ResNet-50's parameters, with a gradient."""
    parameters = [
        Parameter(torch.zeros(1, *shape[1:]) if len(shape) > 1 else torch.zeros(4)) for shape in RESNET50
    ]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    return parameters


def _mover(parameters: list[Parameter]) -> Callable[[], None]:
    """Return a function that gives all parameters gradients at other addresses."""
    places: Iterator[list[Tensor]] = cycle([[torch.zeros_like(p) for p in parameters] for _ in range(2)])

    def move() -> None:
        for p, gradient in zip(parameters, next(places), strict=True):
            p.grad = gradient

    return move


def _renewer(optimizer: SparseOpt) -> Callable[[], None]:
    """Return a function that writes all masks."""

    def renew() -> None:
        for mask in optimizer._masks.values():
            mask.fill_(True)

    return renew


def _sparseopt(backend: str) -> Callable[[list[Parameter]], SparseOpt]:
    def make(parameters: list[Parameter]) -> SparseOpt:
        masks = {p: torch.ones(p.shape, dtype=torch.bool) for p in parameters if p.ndim > 1}
        return SparseOpt(parameters, masks=masks, backend=backend, **_OPTIONS)

    return make


def _cpu_turns() -> dict[str, Turn]:
    """Return the backend "cpu" in each way to find out what has changed, the quickest first."""
    if change_detection.READER is None:
        return {}
    without: dict[str, list[Any]] = {
        "made again natively": [],
        "observed natively": [last_step],
        "observed in Python": [last_step, change_detection],
    }
    turns = {}
    for way, modules in without.items():
        for size, parameters in (("", _parameters()), ("one tensor, ", _parameters()[:1])):
            step = _sparseopt("cpu")(parameters).step
            turns[f"SparseOpt cpu, {size}{way}"] = Turn(_without_reader(step, modules))
    return turns


def _without_reader(step: Callable[[], object], modules: list[Any]) -> Callable[[], None]:
    """Return the step, made while these modules have no native reader."""

    def without() -> None:
        readers = [module.READER for module in modules]
        for module in modules:
            module.READER = None
        try:
            step()
        finally:
            for module, reader in zip(modules, readers, strict=True):
                module.READER = reader

    return without


def _sgd(parameters: list[Parameter]) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, fused=True, **_OPTIONS)


@contextmanager
def _stubs() -> Iterator[dict[str, Callable[[list[Parameter]], SparseOpt]]]:
    """Yield makers of SparseOpt for the installed GPU backends, whose launches do nothing in this block."""
    nothing: Any = lambda *arguments, **keywords: None  # noqa: E731
    made = {}
    with ExitStack() as stack:
        stack.enter_context(patch.object(torch, "_fused_sgd_", nothing))
        # Where nothing counts, c_i is whatever the memory held.
        stack.enter_context(patch.object(factors, "warn_of_concentration", nothing))
        if triton.TRITON.unavailable(torch.device("cuda")) is None:
            if stand_in_driver.compiler():
                stack.enter_context(stand_in_driver.active())
            else:
                kernel = type("Kernel", (), {"__getitem__": lambda self, grid: nothing})()
                stack.enter_context(patch.object(triton, "_load", lambda *_, **__: triton.Loaded(kernel, 1)))
            stack.enter_context(patch.dict(triton.LOADED, clear=True))
            stack.enter_context(patch.object(triton.TRITON, "unavailable", nothing))
            made["SparseOpt triton"] = _sparseopt("triton")
        if cuda.build_info()["cuda"]:
            from sparseopt_kernels import _cuda

            stubs = dict.fromkeys(_CUDA_LAUNCHES, nothing)
            library = SimpleNamespace(**{**vars(_cuda), **stubs})
            stack.enter_context(patch.object(cuda, "_cuda", library))
            stack.enter_context(patch.object(cuda.CUDA, "unavailable", nothing))
            made["SparseOpt cuda"] = _sparseopt("cuda")
        yield made


if __name__ == "__main__":
    sys.exit(main())
