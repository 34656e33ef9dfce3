"""The command ``bench``: times a step of SparseOpt and its rivals on this machine, on given layer shapes."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from ... import kernels
from ..machine import machine
from ..timing import QUIET, processor_share
from ..training.errors import TrainingError
from ..training.options import number
from .measure import measure, measure_pass
from .network import Shape
from .report import OURS, share_of_training, table, verdict

if TYPE_CHECKING:
    # What add_subparsers() returns has no public name.
    from argparse import _SubParsersAction

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_LAYERS: list[Shape] = [(4096, 2048), (1024, 1024)]
_SPARSITIES = [0.5, 0.9, 0.95, 0.99]
_SECONDS = 40.0
_BATCH = 128

_EPILOG = """\
SparseOpt, masked SGD written by hand in plain PyTorch, and PyTorch's dense SGD take turns on the same
weights, gradients and random masks, with momentum and weight decay. The results of each are compared with a
reference first: one that is wrong is not timed.

    sparseopt bench --layers 512x784 512x512 10x512 --sparsity 0.95
    sparseopt bench --layers 64x64x3x3 128x128x3x3 --dtype bfloat16
"""


def add_parser(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``bench`` to what ``ArgumentParser.add_subparsers()`` returned; ``args.run(args)`` runs it."""
    parser = subparsers.add_parser(
        "bench",
        help="time a step on your machine, for your layers, in under a minute",
        description="Time an optimizer step on layers of the given shapes, beside PyTorch's.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--layers",
        type=_shape,
        nargs="+",
        default=_LAYERS,
        metavar="SHAPE",
        help="shapes of the weights: 4096x2048 is 4096 neurons of 2048 inputs, 64x64x3x3 a convolution "
        f"(default: {' '.join(map(_shown, _LAYERS))})",
    )
    parser.add_argument(
        "--sparsity",
        type=number(float, lambda v: 0 <= v < 1, "a number in [0, 1)"),
        nargs="+",
        default=_SPARSITIES,
        help=f"fractions of the weights that are masked (default: {' '.join(map(str, _SPARSITIES))})",
    )
    parser.add_argument(
        "--dtype", choices=_DTYPES, default=_DTYPES[0], help="dtype of the weights (default: %(default)s)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    parser.add_argument(
        "--threads",
        type=number(int, lambda v: 1 <= v <= 4096, "an integer of at least 1"),
        metavar="N",
        help="threads of PyTorch on the CPU (default: PyTorch's)",
    )
    parser.add_argument(
        "--seconds",
        type=number(float, lambda v: 0 < v < math.inf, "a positive number"),
        default=_SECONDS,
        help="time limit of the measurement, about (default: %(default)g)",
    )
    parser.add_argument(
        "--batch",
        type=number(int, lambda v: v >= 1, "an integer of at least 1"),
        default=_BATCH,
        metavar="N",
        help="examples of the forward and backward pass that a step is compared with (default: %(default)s)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar, print the results only")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run ``bench`` with parsed arguments and return the exit code: 1 if SparseOpt's results are wrong."""
    threads = torch.get_num_threads()
    try:
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        return _run(args)
    except TrainingError as error:
        print(f"sparseopt bench: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("sparseopt bench: stopped", file=sys.stderr)
        return 130
    finally:
        torch.set_num_threads(threads)


def _run(args: argparse.Namespace) -> int:
    device = _device(args.device)
    backend = _backend(device)
    before = processor_share()
    try:
        with _progress(args.seconds, args.quiet) as show:
            found = measure(
                args.layers, args.sparsity, getattr(torch, args.dtype), device, args.seconds, show
            )
        training_pass = measure_pass(args.layers, args.batch, getattr(torch, args.dtype), device)
    except (RuntimeError, MemoryError) as error:  # PyTorch raises a plain RuntimeError if a CPU has no memory
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "allocate" not in str(error):
            raise
        raise TrainingError(
            f"{device} has too little memory for --layers: name fewer or smaller ones"
        ) from error
    share = min(before, processor_share())
    weights = sum(map(math.prod, args.layers))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else machine()
    threads = torch.get_num_threads()
    print(f"{where}, {threads} {'thread' if threads == 1 else 'threads'}, PyTorch {torch.__version__}")
    print(
        f"layers {' '.join(map(_shown, args.layers))}: {weights / 1e6:.3g} million weights in {args.dtype}; "
        f"{device} tensors go to: {backend}"
    )
    print()
    print("\n".join([*table(found), ""]))
    if share < QUIET:
        print(
            f"Other programs were running: a thread got {share:.0%} of a processor. Nothing is concluded "
            "from these times: run it again on a quiet machine."
        )
    for each in found:
        if share >= QUIET or OURS not in each.times:
            print(verdict(each))
    if share >= QUIET and training_pass is not None and any(OURS in each.times for each in found):
        print(share_of_training(found, args.batch, training_pass))
    if share >= QUIET:
        print("(within noise: the middle 60% of the steps overlap)")
    return 1 if any(OURS in each.wrong for each in found) else 0


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type in ("cpu", "cuda"):
            torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise TrainingError(f"--device {name} cannot be used: {reason}") from error
    if device.type not in ("cpu", "cuda"):
        raise TrainingError(f"--device is {name}, it must be cpu or a CUDA device")
    return device


def _backend(device: torch.device) -> str:
    try:
        backend = kernels.backend_for(kernels.chosen_name("auto"), device)
    except (RuntimeError, ValueError) as error:
        raise TrainingError(f"{device} tensors cannot be updated: {error}") from error
    return kernels.name_of(backend)


@contextmanager
def _progress(seconds: float, quiet: bool) -> Iterator[Callable[[float], None]]:
    """Yield a function that shows the elapsed seconds as a bar, on a terminal, if tqdm is installed."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        quiet = True
    if quiet or not sys.stderr.isatty():
        yield lambda elapsed: None
        return
    with tqdm(total=round(seconds), unit="s", leave=False, bar_format="{l_bar}{bar}| {elapsed}") as bar:
        bar.set_description("timing steps")

        def show(elapsed: float) -> None:
            bar.n = min(round(elapsed), bar.total)
            bar.refresh()

        yield show


def _shape(text: str) -> Shape:
    parts = text.split("x")
    if len(parts) < 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape such as 4096x2048 or 64x64x3x3")
    return tuple(map(int, parts))


def _shown(shape: Shape) -> str:
    return "x".join(map(str, shape))
