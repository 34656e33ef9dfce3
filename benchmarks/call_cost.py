"""What the call of a step costs the host, without the work of a GPU: ``python benchmarks/call_cost.py``.

A step of ResNet-50's 161 tensors whose kernels are stubs, by backend, with gradients that stay where they are
and with gradients that move in every step, beside ``torch.optim.SGD(fused=True)``, its kernel stubbed, too.

No GPU is needed: tensors lie on the CPU, with one row each, for nothing but their number matters. So the
figures lack what a real GPU would cost the host: its launches, pinning the memory that is copied to it, the
context manager of its device, and the query whether a CUDA graph is being captured.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import cycle
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from networks import RESNET50
from torch import Tensor
from torch.nn.parameter import Parameter

from sparseopt_kernels import SparseOpt
from sparseopt_kernels.kernels import cuda, triton
from sparseopt_kernels.text_table import aligned
from sparseopt_kernels.timing import CpuTimer, Rounds, Turn, take_turns

_OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
_ROUNDS = Rounds(timed=400, warmup=40)


def main() -> int:
    torch.set_num_threads(1)
    with _stubs() as backends:
        turns = {}
        for name, make in {**backends, "SGD fused": _sgd}.items():
            turns[name] = Turn(make(_parameters()).step)
            parameters = _parameters()
            turns[f"{name}, gradients move"] = Turn(make(parameters).step, _mover(parameters))
        found = take_turns(turns, CpuTimer(), _ROUNDS)
    header = ("161 tensors, kernels stubbed: us", "p20", "p50", "p80")
    rows = [(name, *(f"{1e3 * ms:.0f}" for ms in summary[:3])) for name, summary in found.items()]
    print("\n".join(aligned([header, *rows])))
    return 0


def _parameters() -> list[Parameter]:
    """One row of each of ResNet-50's parameters, with a gradient."""
    parameters = [
        Parameter(torch.zeros(1, *shape[1:]) if len(shape) > 1 else torch.zeros(4)) for shape in RESNET50
    ]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    return parameters


def _mover(parameters: list[Parameter]) -> Callable[[], None]:
    """Gives all of them gradients that are elsewhere."""
    places: Iterator[list[Tensor]] = cycle([[torch.zeros_like(p) for p in parameters] for _ in range(2)])

    def move() -> None:
        for p, gradient in zip(parameters, next(places), strict=True):
            p.grad = gradient

    return move


def _sparseopt(backend: str) -> Callable[[list[Parameter]], SparseOpt]:
    def make(parameters: list[Parameter]) -> SparseOpt:
        masks = {p: torch.ones(p.shape, dtype=torch.bool) for p in parameters if p.ndim > 1}
        return SparseOpt(parameters, masks=masks, backend=backend, **_OPTIONS)

    return make


def _sgd(parameters: list[Parameter]) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, fused=True, **_OPTIONS)


@contextmanager
def _stubs() -> Iterator[dict[str, Callable[[list[Parameter]], SparseOpt]]]:
    """Makers of SparseOpt by name, whose launches do nothing while this lasts; those that are installed."""
    nothing: Any = lambda *arguments, **keywords: None  # noqa: E731
    made = {}
    with ExitStack() as stack:
        stack.enter_context(patch.object(torch, "_fused_sgd_", nothing))
        if triton.TRITON.unavailable(torch.device("cuda")) is None:
            from sparseopt_kernels.kernels import triton_step

            kernel = type("Kernel", (), {"__getitem__": lambda self, grid: nothing})()
            for name in ("masked_step", "dense_step"):
                stack.enter_context(patch.object(triton_step, name, kernel))
            stack.enter_context(patch.object(triton.TRITON, "unavailable", nothing))
            made["SparseOpt triton"] = _sparseopt("triton")
        if cuda.build_info()["cuda"]:
            from sparseopt_kernels import _cuda

            library = SimpleNamespace(**{**vars(_cuda), "pack": nothing, "step": nothing})
            stack.enter_context(patch.multiple(cuda, _cuda=library, _stream=lambda device: 0))
            stack.enter_context(patch.object(cuda.CUDA, "unavailable", nothing))
            made["SparseOpt cuda"] = _sparseopt("cuda")
        yield made


if __name__ == "__main__":
    sys.exit(main())
