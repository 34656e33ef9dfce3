"""The command ``doctor``: lists versions, devices and backends, and checks each backend's results."""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from .. import kernels, native_library
from .._version import __version__
from ..optimizer import SparseOpt
from .machine import machine

if TYPE_CHECKING:
    from argparse import _SubParsersAction

_OPTIONAL = ("triton", "numpy", "scipy", "scikit-learn", "matplotlib", "tqdm")


def add_parser(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="show versions, devices and backends, and check each backend",
        description="Show versions, devices and backends, and compare the results of each backend with the "
        "reference. The exit code is 1 if one gives wrong results, else 0.",
    )
    parser.set_defaults(run=run)


def run(_: argparse.Namespace) -> int:
    """Print the report and return the exit code: 0 if every backend that runs here is right, else 1."""
    print(f"sparseopt_kernels {__version__}, Python {platform.python_version()}, PyTorch {torch.__version__}")
    print("optional packages: " + ", ".join(f"{name} {_version(name)}" for name in _OPTIONAL))
    print(f"machine: {machine()}, {platform.machine()}; PyTorch uses {torch.get_num_threads()} threads")
    print("devices: " + ", ".join(_devices()))
    info = kernels.build_info()
    print("built: " + ", ".join(f"{key}={_plain(value)}" for key, value in info.items()))
    for variable in ("SPARSEOPT_BACKEND", "SPARSEOPT_CPU_ISA", "SPARSEOPT_CPU_STRATEGY"):
        if os.environ.get(variable):
            print(f"environment: {variable}={os.environ[variable]}")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        try:
            auto = kernels.backend_for(kernels.chosen_name("auto"), torch.device(device))
        except (RuntimeError, ValueError) as error:
            print(f"{device} tensors cannot be updated: {error}")
            return 1
        print(f"{device} tensors go to: {kernels.name_of(auto)}")
    print("backends:")
    all_right = True
    for name, backend in kernels.BACKENDS.items():
        for device in devices:
            reason = backend.unavailable(torch.device(device))
            if reason is not None:
                print(f"  {name:10} {device:5} not available: {reason}")
                continue
            try:
                difference = _largest_difference(name, device)
            except Exception as error:  # of any type: compilers raise their own
                all_right = False
                print(f"  {name:10} {device:5} FAILED: {str(error) or repr(error)}")
                continue
            right = difference <= _TOLERANCE
            all_right &= right
            verdict = "available, results match" if right else "WRONG RESULTS: largest difference"
            print(f"  {name:10} {device:5} {verdict} ({difference:.1e} from the float64 reference)")
    if all_right and kernels.BACKENDS["cpu"].unavailable(torch.device("cpu")) is None:
        print("\n".join(_strategies()))
    if not all_right:
        print(
            "A backend fails its check. Unless one of your settings is wrong, please report this output; "
            "until it is mended, use backend='reference'."
        )
    return 0 if all_right else 1


# Ten float32 steps on weights of size 1 lose a few units in the last place (6e-8) each.
_TOLERANCE = 1e-5


def _largest_difference(backend: str, device: str) -> float:
    """Return the largest absolute difference to the float64 reference after ten float32 steps."""
    got = _ten_steps(backend, device, torch.float32)
    want = _ten_steps("reference", "cpu", torch.float64)
    return max(float((g.double().cpu() - w).abs().max()) for g, w in zip(got, want, strict=True))


def _ten_steps(backend: str, device: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    parameters = [Parameter(random(24, 3, 3, 3)), Parameter(random(33, 1031)), Parameter(random(33))]
    masks = {p: random(*p.shape) > 1.0 for p in parameters[:2]}
    optimizer = SparseOpt(
        parameters, lr=0.1, momentum=0.9, weight_decay=1e-3, nesterov=True, masks=masks, backend=backend
    )
    for step in range(10):
        for parameter in parameters:
            parameter.grad = random(*parameter.shape)
        if step == 5:
            for mask in masks.values():
                mask.copy_(random(*mask.shape) > 1.5)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def _strategies() -> list[str]:
    """Return lines on what the CPU backend measures and decides in large steps, at four sparsities."""
    for sparsity in (0.9, 0.95, 0.97, 0.99):
        parameter = Parameter(torch.zeros(2048, 2048))
        parameter.grad = torch.zeros_like(parameter)
        masks = {parameter: torch.rand(parameter.shape) >= sparsity}
        optimizer = SparseOpt([parameter], lr=0.1, momentum=0.9, masks=masks, backend="cpu")
        for _ in range(8):
            optimizer.step()
    lines = [
        "cpu backend, large float32 steps: a block has 16 weights and is live if one of them is active;",
        "it visits the live blocks by a list (list), or all blocks (stream), whichever was faster:",
    ]
    lines += [
        f"  {d.live_share:4.0%} live: {d.strategy:6} (nanoseconds per block: list {d.list_ns:.1f}, "
        f"stream {d.stream_ns:.1f})"
        for d in native_library.decisions()
        if d.step_bytes == 3 * 4 * 2048 * 2048
    ]
    return lines


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    return ["cpu", *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))]


def _plain(value: object) -> str:
    return "/".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
