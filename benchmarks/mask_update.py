"""The time of a mask update on a CPU, in the native library and in PyTorch: ``make mask-update``.

For each network and dtype it prints milliseconds of a step of SparseOpt, of ``dst.step()`` of RigL and SET
when an update is due, and of the step of SparseOpt after it, which prepares for the new masks. In brackets is
an update's share of the 100 steps between two updates. ``start`` is the first update of a run, which drops
``drop_fraction`` of the active weights; the others drop half as many, the mean over a run. Then it prints the
time of ``sparsify``.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from unittest.mock import patch

import torch
from networks import LAYERS_4096X2048, RESNET50
from torch import nn
from torch.nn.parameter import Parameter

from sparseopt_kernels import native_library, sparsify
from sparseopt_kernels.kernels.memory import DTYPE_NAMES
from sparseopt_kernels.lab.bench.contestants import sparseopt
from sparseopt_kernels.lab.bench.network import Network, Shape
from sparseopt_kernels.lab.machine import machine
from sparseopt_kernels.lab.timing import CpuTimer, Rounds, Summary, Turn, take_turns
from sparseopt_kernels.text_table import aligned
from sparseopt_kernels.topology import update_plan
from sparseopt_kernels.topology.densities import Distribution
from sparseopt_kernels.topology.drop_schedules import DropSchedule
from sparseopt_kernels.topology.rigl import RigL
from sparseopt_kernels.topology.set import SET

_UPDATE_EVERY = 100
_SPARSITY = 0.95
_NETWORKS: dict[str, tuple[list[Shape], Distribution]] = {
    "ResNet-50, ERK": ([shape for shape in RESNET50 if len(shape) > 1], "erk"),
    "4 layers of 4096x2048": (LAYERS_4096X2048, "uniform"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What an update of the masks costs on a CPU.")
    parser.add_argument(
        "--rounds", type=int, default=9, help="how often each is timed natively (%(default)s)"
    )
    parser.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPE_NAMES.values()), metavar="DTYPE")
    options = parser.parse_args(arguments)
    if native_library.MISSING is not None:
        print("there is no native library to measure")
        return 1
    torch.set_num_threads(options.threads)
    rows = []
    for name, (shapes, distribution) in _NETWORKS.items():
        for dtype in options.dtypes:
            network = _network(shapes, distribution, getattr(torch, dtype))
            turns = _turns(network)
            # Two rounds only, because PyTorch's updates take a hundred times as long.
            slow = {own: turns.pop(own) for own in _CONTESTANTS if own.endswith("PyTorch")}
            found = take_turns(turns, CpuTimer(), Rounds(timed=options.rounds, warmup=1))
            found |= take_turns(slow, CpuTimer(), Rounds(timed=2, warmup=0))
            rows.append((name, dtype, *_cells(found)))
            print("  ".join(rows[-1]), file=sys.stderr, flush=True)  # it takes minutes
    header = ("", "dtype", "step", *_CONTESTANTS, _STEP_AFTER)
    print(f"{machine()}, threads: {options.threads}, sparsity {_SPARSITY}: median milliseconds")
    print("\n".join(aligned([header, *rows])))
    print()
    print("\n".join(aligned([("sparsify", "native", "PyTorch"), *(_sparsify(name) for name in _NETWORKS)])))
    return 0


def _network(shapes: Sequence[Shape], distribution: Distribution, dtype: torch.dtype) -> Network:
    network = Network.of_shapes(shapes, _SPARSITY, distribution)
    parameters = [Parameter(p.detach().to(dtype)) for p in network.parameters]
    for p, gradient in zip(parameters, network.gradients, strict=True):
        p.grad = gradient.to(dtype)
    masks = {own: network.masks[p] for own, p in zip(parameters, network.parameters, strict=True)}
    return Network(parameters, masks, [p.grad for p in parameters if p.grad is not None])


_CONTESTANTS: dict[str, tuple[type[RigL] | type[SET], float, bool]] = {
    "RigL, start": (RigL, 1.0, True),
    "RigL": (RigL, 0.5, True),
    "SET": (SET, 0.5, True),
    "RigL, PyTorch": (RigL, 0.5, False),
    "SET, PyTorch": (SET, 0.5, False),
}
_STEP_AFTER = "step after"


def _turns(network: Network) -> dict[str, Turn]:
    optimizer = sparseopt(network)

    def between_updates() -> None:
        for gradient in network.gradients:
            gradient.normal_()
        for _ in range(2):  # the first one prepares for the changed masks
            optimizer.step()

    turns = {"step": Turn(optimizer.step, between_updates)}
    for name, (cls, factor, is_native) in _CONTESTANTS.items():
        # Without skip_step, because the step after an update is timed.
        dst = cls(network.masks, 0.3, 1, stop_at=math.inf, drop_schedule=_always(factor), skip_step=False)
        dst.step()  # only the first one compares the masks with those that dst was made with
        turns[name] = Turn(dst.step if is_native else _by_pytorch(dst.step), between_updates)

    def update() -> None:
        between_updates()
        dst.step()

    turns[_STEP_AFTER] = Turn(optimizer.step, update)
    return turns


def _always(factor: float) -> DropSchedule:
    return lambda step, stop_at: factor


def _by_pytorch(step: Callable[[], None]) -> Callable[[], None]:
    def patched() -> None:
        with patch.object(update_plan, "supports", lambda layers: False):
            step()

    return patched


def _cells(found: dict[str, Summary]) -> list[str]:
    step = found["step"].p50_ms
    updates = [found[name].p50_ms for name in _CONTESTANTS]
    shares = [f"{update:.1f} ({update / step / _UPDATE_EVERY:.1%})" for update in updates]
    return [f"{step:.1f}", *shares, f"{found[_STEP_AFTER].p50_ms:.1f}"]


def _sparsify(name: str) -> tuple[str, str, str]:
    shapes, distribution = _NETWORKS[name]
    layers = [nn.Linear(math.prod(shape[1:]), shape[0], bias=False) for shape in shapes]

    def sparsified() -> None:
        sparsify(nn.Sequential(*layers), _SPARSITY, distribution)

    def forget() -> None:
        for layer in layers:
            layer._buffers.pop("weight_mask", None)

    def by_pytorch() -> None:
        with patch.object(native_library, "MISSING", "for comparison"):
            sparsified()

    found = take_turns(
        {"native": Turn(sparsified, forget), "PyTorch": Turn(by_pytorch, forget)}, CpuTimer(), Rounds(5, 1)
    )
    return name, f"{found['native'].p50_ms:.0f}", f"{found['PyTorch'].p50_ms:.0f}"


if __name__ == "__main__":
    sys.exit(main())
