"""The options of ``train`` and the values that each accepts. ``config`` checks them together."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, get_args

from ... import kernels
from ...kernels.contract import NormOver
from ...topology.densities import Distribution
from .config import AMP, DEFAULTS_BY_DATA, METHODS, OPTIMIZERS, Config, Parallel
from .data import DATASETS
from .models import MODELS

CHECKPOINT_NAME = "checkpoint.pt"

_T = TypeVar("_T", int, float)


def add_experiment(group: argparse._ArgumentGroup) -> None:
    """Add the options of data, network, masks, optimizers and seeds."""
    group.add_argument("--data", choices=DATASETS, help=f"data set (default: {Config.data})")
    group.add_argument(
        "--data-dir",
        metavar="DIR",
        help="folder with the files of fashion-mnist (default: that of Debian's package "
        "dataset-fashion-mnist, else they are downloaded), of cifar-100 (default: they are downloaded) or of "
        "imagenet (train/CLASS/*.JPEG and val/CLASS/*.JPEG)",
    )
    group.add_argument("--model", choices=MODELS, help=f"network (default: {Config.model})")
    group.add_argument(
        "--method",
        choices=METHODS,
        help=f"how the masks change: not at all, SET or RigL (default: {Config.method})",
    )
    group.add_argument(
        "--sparsity",
        type=number(float, lambda v: 0 <= v < 1, "a number in [0, 1)"),
        help=f"fraction of the weights that are masked (default: {Config.sparsity})",
    )
    group.add_argument(
        "--distribution",
        choices=get_args(Distribution),
        help=f"how sparsity is distributed over the layers (default: {Config.distribution})",
    )
    group.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        nargs="+",
        help="one or several: sparseopt has the correction of Eq. 12, sgd is SparseOpt without it (masked "
        f"SGD), by-hand is masked SGD in plain PyTorch (default: {' '.join(Config.optimizer)})",
    )
    group.add_argument(
        "--seeds",
        type=number(int, lambda v: 0 <= v < 2**63, "an integer of at least 0"),
        nargs="+",
        metavar="SEED",
        help=f"random seeds, one or several (default: {' '.join(map(str, Config.seeds))})",
    )


def add_training(group: argparse._ArgumentGroup) -> None:
    """Add the hyperparameters of training."""
    positive = number(float, lambda v: 0 < v < math.inf, "a positive number")
    not_negative = number(float, lambda v: 0 <= v < math.inf, "a number of at least 0")
    at_least_1 = number(int, lambda v: v >= 1, "an integer of at least 1")
    group.add_argument(
        "--epochs", type=at_least_1, help=f"passes over the training data {_by_data('epochs')}"
    )
    group.add_argument(
        "--batch-size",
        # Batch normalisation has no variance to divide by in a batch of one.
        type=number(int, lambda v: v >= 2, "an integer of at least 2"),
        help=f"examples per step {_by_data('batch_size')}",
    )
    group.add_argument("--lr", type=positive, help=f"learning rate after the warm-up (default: {Config.lr})")
    group.add_argument(
        "--start-lr",
        type=not_negative,
        help=f"learning rate at the start of the warm-up (default: {Config.start_lr})",
    )
    group.add_argument(
        "--end-lr",
        type=not_negative,
        help=f"learning rate at the end of the cosine decay (default: {Config.end_lr})",
    )
    group.add_argument(
        "--warmup-epochs",
        type=number(int, lambda v: v >= 0, "an integer of at least 0"),
        help=f"epochs of linear warm-up {_by_data('warmup_epochs')}",
    )
    group.add_argument(
        "--momentum",
        type=number(float, lambda v: 0 <= v < 1, "a number in [0, 1)"),
        help=f"momentum of the optimizers (default: {Config.momentum})",
    )
    group.add_argument(
        "--weight-decay",
        type=not_negative,
        help=f"weight decay of the optimizers (default: {Config.weight_decay})",
    )
    group.add_argument(
        "--drop-fraction",
        type=number(float, lambda v: 0 <= v <= 1, "a number in [0, 1]"),
        help="fraction of the active weights that the first update of SET or RigL drops "
        f"(default: {Config.drop_fraction})",
    )
    group.add_argument(
        "--update-every",
        type=at_least_1,
        metavar="STEPS",
        help=f"steps between two updates of SET or RigL {_by_data('update_every')}",
    )
    group.add_argument(
        "--skip-step",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help="leave out the optimizer's step that follows an update of the masks, as RigL's published code "
        "does (default: --skip-step)",
    )
    group.add_argument(
        "--min-fan-in",
        type=number(int, lambda v: v >= 0, "an integer of at least 0"),
        metavar="INPUTS",
        help="active weights that every neuron keeps, from the first masks on "
        f"(default: {Config.min_fan_in})",
    )
    group.add_argument(
        "--regrow",
        choices=("original", "corrected"),
        help="gradient by which RigL chooses the weights to grow: as backward() leaves it, or times c_i "
        f"(default: {Config.regrow})",
    )
    group.add_argument(
        "--max-grad-norm",
        type=_limit,
        metavar="NORM",
        help=f"limit of the global gradient norm, or none (default: {Config.max_grad_norm:g})",
    )
    group.add_argument(
        "--max-grad-norm-over",
        choices=get_args(NormOver),
        help="what counts in that norm: gradients of active weights, or of all positions; by-hand has the "
        f"former only (default: {Config.max_grad_norm_over})",
    )
    group.add_argument(
        "--ham-alpha",
        type=not_negative,
        metavar="ALPHA",
        help="strength of Hyperbolic Aware Minimization (HAM); by-hand does not have it (default: 0, off)",
    )


def add_machine(group: argparse._ArgumentGroup) -> None:
    """Add the options of the machine and of output files."""
    group.add_argument(
        "--backend",
        choices=("auto", *kernels.BACKENDS),
        help=f"backend of SparseOpt (default: {Config.backend})",
    )
    add_speed(group)
    group.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    group.add_argument(
        "--threads",
        type=number(int, lambda v: 1 <= v <= 4096, "an integer of at least 1"),
        help="threads of PyTorch on the CPU (default: 1 for digits, else PyTorch's)",
    )
    group.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for the results (default: runs/DATA-MODEL-METHOD-SPARSITY)",
    )
    group.add_argument(
        "--checkpoint",
        type=Path,
        nargs="?",
        const=None,
        metavar="FILE",
        help=f"save a checkpoint after each epoch (default FILE: {CHECKPOINT_NAME} in the output folder)",
    )
    group.add_argument(
        "--resume",
        type=Path,
        nargs="?",
        const=None,
        metavar="PATH",
        help="continue from this checkpoint file, or from the checkpoint in this output folder (default "
        "PATH: that of --checkpoint or --output, else the newest default folder). Options that are not given "
        "keep their former values",
    )
    group.add_argument("--quiet", action="store_true", help="no progress bar, print the table only")


def add_speed(group: argparse._ArgumentGroup) -> None:
    """Add the options that make training faster, for ``train`` and ``reproduce``."""
    group.add_argument(
        "--parallel",
        choices=[name for name in get_args(Parallel) if name != "none"],
        help="under torchrun: ddp has the whole network on every rank (DistributedDataParallel), fsdp a part "
        "of each layer (fully_shard) (default: ddp)",
    )
    group.add_argument(
        "--amp",
        choices=get_args(AMP),
        help="mixed precision: torch.autocast in this type, with a loss scale for float16 (default: none)",
    )
    group.add_argument(
        "--channels-last", action="store_true", help="weights and images in channels_last memory format"
    )
    group.add_argument(
        "--loader-workers",
        type=number(int, lambda v: 0 <= v <= 4096, "an integer of at least 0"),
        metavar="N",
        help=f"processes that decode images, for imagenet (default: {Config.loader_workers})",
    )


def number(parse: Callable[[str], _T], accepts: Callable[[_T], bool], expected: str) -> Callable[[str], _T]:
    """Return a ``type=`` for argparse whose error names the expected values."""

    def convert(text: str) -> _T:
        try:
            value = parse(text)
        except ValueError:
            value = None
        if value is None or not accepts(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
        return value

    return convert


def _limit(text: str) -> float | None:
    limit = number(float, lambda v: 0 < v < math.inf, "a positive number, or none")
    return None if text == "none" else limit(text)


def _by_data(name: str) -> str:
    """Return the defaults of an option by data set, for its help text."""
    values = "; ".join(f"{defaults[name]} for {data}" for data, defaults in DEFAULTS_BY_DATA.items())
    return f"(default: {values})"
