"""The configuration of a training experiment: every option that its numbers depend on, with the defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

from ... import kernels
from ...kernels.contract import NormOver
from ...topology.densities import Distribution
from . import distributed
from .errors import TrainingError

AMP = Literal["none", "float16", "bfloat16"]
Parallel = Literal["none", "ddp", "fsdp"]
METHODS = ("static", "set", "rigl")
OPTIMIZERS = ("by-hand", "sgd", "sparseopt")

# Defaults that depend on the size of the data set. On digits, a second thread costs more than it saves.
DEFAULTS_BY_DATA: dict[str, dict[str, Any]] = {
    "digits": {"epochs": 40, "batch_size": 64, "warmup_epochs": 2, "update_every": 25, "threads": 1},
    "fashion-mnist": {"epochs": 15, "batch_size": 128, "warmup_epochs": 1, "update_every": 100},
    "cifar-100": {"epochs": 100, "batch_size": 256, "warmup_epochs": 5, "update_every": 100},
    "imagenet": {"epochs": 90, "batch_size": 128, "warmup_epochs": 5, "update_every": 100},
}


@dataclass(frozen=True)
class Config:
    """One experiment: every optimizer of ``optimizer`` with every seed of ``seeds``.

    The fields are the options of ``train``, under their names.
    """

    epochs: int
    batch_size: int
    warmup_epochs: int
    update_every: int
    threads: int
    device: str
    data: str = "digits"
    data_dir: str | None = None
    model: str = "mlp"
    method: str = "rigl"
    sparsity: float = 0.95
    distribution: Distribution = "erk"
    optimizer: tuple[str, ...] = ("sgd", "sparseopt")
    lr: float = 0.1
    start_lr: float = 0.0
    end_lr: float = 1e-6
    momentum: float = 0.9
    weight_decay: float = 5e-4
    drop_fraction: float = 0.3
    skip_step: bool = True
    min_fan_in: int = 0
    regrow: Literal["original", "corrected"] = "original"
    ham_alpha: float = 0.0
    max_grad_norm: float | None = 1.0
    max_grad_norm_over: NormOver = "active"
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    parallel: Parallel = "none"
    amp: AMP = "none"
    channels_last: bool = False
    loader_workers: int = 4
    backend: str = "auto"

    @property
    def name(self) -> str:
        """The default name of the output folder."""
        return f"{self.data}-{self.model}-{self.method}-{self.sparsity:g}"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as numbers, strings, lists and None, for JSON and for checkpoints."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


OPTIONS = tuple(field.name for field in fields(Config))
# The values of options that are missing in older checkpoints: the defaults, except where they have changed.
_FORMERLY = {field.name: field.default for field in fields(Config) if field.default is not MISSING} | {
    "skip_step": False,
    "max_grad_norm": None,
}
# Options that may differ when an experiment is resumed, on another machine say: they do not change the data.
_MACHINE = ("data_dir", "loader_workers")


def default_parallel() -> Parallel:
    return "ddp" if distributed.launched() else "none"


def new_config(given: Mapping[str, Any]) -> Config:
    """Return the configuration with the given options, and defaults for all others.

    Raises:
        TrainingError: options contradict each other, or cannot work on this machine.
    """
    values: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "parallel": default_parallel(),
        **DEFAULTS_BY_DATA[given.get("data", Config.data)],
        **given,
    }
    if "warmup_epochs" not in given:
        values["warmup_epochs"] = min(values["warmup_epochs"], values["epochs"] - 1)
    config = Config(**values)
    check(config)
    return config


def saved_config(saved: Mapping[str, Any], given: Mapping[str, Any], source: Path) -> Config:
    """Return the configuration of a checkpoint.

    Raises:
        TrainingError: an option is given whose value differs from the checkpoint's.
    """
    for name, value in given.items():
        value = list(value) if isinstance(value, tuple) else value
        if name in _MACHINE:
            continue
        started_with = saved.get(name, _FORMERLY.get(name))
        if value != started_with:
            raise TrainingError(
                f"{option(name)} is {_shown(value)}, but the experiment in {source} was started with "
                f"{_shown(started_with)}: leave the option out to continue it, or start another with --output"
            )
    values: dict[str, Any] = {**_FORMERLY, **saved, **given}
    for name in ("optimizer", "seeds"):
        values[name] = tuple(values[name])
    config = Config(**values)
    check(config)
    return config


def option(name: str) -> str:
    """Return the command-line option that sets a field of :class:`Config`."""
    return "--" + name.replace("_", "-")


def check(config: Config) -> None:
    """Raise ``TrainingError`` if options contradict each other or cannot work on this machine."""
    if config.warmup_epochs >= config.epochs:
        raise TrainingError(
            f"--warmup-epochs is {config.warmup_epochs}, it must be less than --epochs ({config.epochs})"
        )
    if config.data_dir and config.data == "digits":
        raise TrainingError("--data-dir is not for --data digits, which comes with scikit-learn")
    for name in ("optimizer", "seeds"):
        values = getattr(config, name)
        if len(set(values)) < len(values):
            raise TrainingError(f"{option(name)} names something twice: {_shown(values)}")
    if "by-hand" in config.optimizer and (config.ham_alpha or config.max_grad_norm_over == "dense"):
        raise TrainingError(
            "--optimizer by-hand is plain PyTorch: it has neither --ham-alpha nor --max-grad-norm-over dense"
        )
    check_device(config.device, config.backend)
    _check_parallel(config)


def _check_parallel(config: Config) -> None:
    if config.parallel == "none" and distributed.launched():
        raise TrainingError(
            "torchrun has started several processes for an experiment of one: start it without torchrun"
        )
    if config.parallel != "none" and not distributed.launched():
        raise TrainingError(
            f"--parallel {config.parallel} is for several processes: start them with "
            "torchrun --nproc-per-node N -m sparseopt_kernels"
        )
    if torch.device(config.device).index is not None and distributed.ranks() > 1:
        raise TrainingError(
            f"--device {config.device} is one device for all ranks: with --device cuda, each has its own"
        )
    if config.parallel == "fsdp":
        if "by-hand" in config.optimizer:
            raise TrainingError("--optimizer by-hand does not know sharded parameters: use --parallel ddp")
        if config.channels_last:
            raise TrainingError(
                "--channels-last is not for --parallel fsdp: PyTorch shards contiguous weights"
            )


def check_device(name: str, backend: str) -> None:
    """Raise ``TrainingError`` unless the device exists and the optimizers' backend runs on it."""
    try:
        device = distributed.local_device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise TrainingError(
            f"--device {name} cannot be used ({reason}): use --device cpu, or install a PyTorch "
            "build for the device"
        ) from error
    try:
        kernels.backend_for(kernels.chosen_name(backend), device)
    except (RuntimeError, ValueError) as error:
        raise TrainingError(f"--backend {backend}: {error}") from error


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "on", False: "off"}[value]
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
