"""The time of an optimizer step on a network that is large enough for it to matter.

All contestants take the same steps: with the same gradients of the same batches of real data, in turn. What
is concluded from the times is in ``conclusions``.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ..masks import Masks
from ..optimizer import SparseOpt
from ..timing import QUIET, CpuTimer, CudaTimer, Rounds, Summary, Turn, processor_share, take_turns
from ..topology.sparsify import sparsify
from ..training.by_hand import MaskedSGD
from ..training.data import Dataset, split_order
from ..training.models import mlp

BY_HAND, TUNED, DENSE, PLAIN, CORRECTED = "by-hand", "by-hand-tuned", "dense", "sgd", "sparseopt"
_SGD: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
_SEED = 0


@dataclass(frozen=True)
class Size:
    """Of the network and of the measurement."""

    hidden: tuple[int, ...] = (2048, 2048, 2048)
    sparsity: float = 0.95
    batch_size: int = 64
    rounds: Rounds = field(default_factory=lambda: Rounds(timed=60, warmup=3, fewest=5))
    seconds: float = 40.0  # there are no more rounds after that


@dataclass(frozen=True)
class StepTimes:
    """What was measured.

    Args:
        times: by contestant: ``BY_HAND``, ``TUNED``, ``DENSE``, ``PLAIN`` and ``CORRECTED``.
        weights: how many of the network are masked, active or not.
        sparsity: of the masks, in [0, 1).
        threads: of PyTorch.
        steps: how many each contestant made.
        difference: the largest absolute difference between two weights of the networks of ``BY_HAND`` and
            ``PLAIN`` at the end.
        moved: the largest absolute change of a weight from the start to the end, by hand.
        processor_share: how much of one processor a loop of one thread got just before and after, in [0, 1]:
            what other programs leave.
    """

    times: Mapping[str, Summary]
    weights: int
    sparsity: float
    threads: int
    steps: int
    difference: float
    moved: float
    processor_share: float

    @property
    def is_reliable(self) -> bool:
        """Whether the machine was quiet. If not, threads wait for one another, and times are not those of
        their work: more so the more parallel regions a step has."""
        return self.processor_share >= QUIET


@dataclass
class _Contestant:
    model: nn.Module
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(cls, model: nn.Module, optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> _Contestant:
        return cls(model, optimizer(model))

    def weights(self) -> list[Tensor]:
        return [p.detach() for p in self.model.parameters()]

    def take(self, gradients: list[Tensor]) -> None:
        """Copy the gradients: a contestant may write into its own."""
        for p, gradient in zip(self.model.parameters(), gradients, strict=True):
            if p.grad is None:
                p.grad = torch.empty_like(p)
            p.grad.copy_(gradient)


def measure(dataset: Dataset, size: Size) -> StepTimes:
    """Train an MLP on the data set for some steps, and time each contestant's.

    The gradients are those of ``PLAIN``'s network, dense, as ``backward()`` leaves them. Batches, initial
    weights and masks are the same in every call.
    """
    device = dataset.train_images.device
    pixels = dataset.train_images[0].numel()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = mlp(pixels, dataset.num_classes, size.hidden).to(device)
    masks = sparsify(model, size.sparsity, "uniform", seed=_SEED)
    start = [p.detach().clone() for p in model.parameters()]
    contestants = {name: _Contestant.of(deepcopy(model), make) for name, make in _OPTIMIZERS.items()}
    give = _gradients(contestants[PLAIN].model, dataset, size.batch_size)
    gradients: list[Tensor] = []
    steps = 0
    steps_of: Counter[str] = Counter()

    def prepare(name: str) -> None:
        nonlocal gradients, steps
        if steps_of[name] == steps:  # the first of a round
            gradients = next(give)
            steps += 1
        steps_of[name] += 1
        contestants[name].take(gradients)

    turns = {name: Turn(c.optimizer.step, _called_with(prepare, name)) for name, c in contestants.items()}
    timer = CudaTimer(device) if device.type == "cuda" else CpuTimer()
    before = processor_share()
    end = time.monotonic() + size.seconds
    times = take_turns(turns, timer, size.rounds, lambda: time.monotonic() > end)
    by_hand = contestants[BY_HAND].weights()
    return StepTimes(
        times,
        sum(mask.numel() for mask in masks.values()),
        masks.sparsity(),
        torch.get_num_threads(),
        steps,
        _largest_difference(by_hand, contestants[PLAIN].weights()),
        _largest_difference(by_hand, start),
        min(before, processor_share()),
    )


def _by_hand(model: nn.Module) -> torch.optim.Optimizer:
    """The plainest code: boolean masks and the defaults of ``torch.optim.SGD``."""
    return MaskedSGD(model.parameters(), Masks(model), **_SGD)


def _tuned_by_hand(model: nn.Module) -> torch.optim.Optimizer:
    """The fastest that is as simple: masks of float32, which PyTorch multiplies faster, and fused SGD."""
    masks = {p: mask.to(p.dtype) for p, mask in Masks(model).items()}
    return MaskedSGD(model.parameters(), masks, fused=True, **_SGD)


def _dense(model: nn.Module) -> torch.optim.Optimizer:
    """PyTorch's fused SGD, which does not know of the masks: less than is asked for."""
    return torch.optim.SGD(model.parameters(), fused=True, **_SGD)


def _without_correction(model: nn.Module) -> torch.optim.Optimizer:
    return SparseOpt(model.parameters(), masks=Masks(model), correction="none", **_SGD)


def _corrected(model: nn.Module) -> torch.optim.Optimizer:
    return SparseOpt(model.parameters(), masks=Masks(model), **_SGD)


# In the order of a round: PLAIN's network gives the gradients of the next one when it has made its step.
_OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    BY_HAND: _by_hand,
    TUNED: _tuned_by_hand,
    DENSE: _dense,
    PLAIN: _without_correction,
    CORRECTED: _corrected,
}


def _gradients(model: nn.Module, dataset: Dataset, batch_size: int) -> Iterator[list[Tensor]]:
    """The gradients of ``model``, as it is by then, on one batch after another, epoch after epoch."""
    generator = torch.Generator().manual_seed(_SEED)
    while True:
        order = torch.randperm(len(dataset.train_labels), generator=generator)
        for indices in split_order(order, batch_size):
            images, labels = dataset.train_images[indices], dataset.train_labels[indices]
            loss = F.cross_entropy(model(images), labels)
            yield list(torch.autograd.grad(loss, list(model.parameters())))


def _called_with(function: Callable[[str], None], name: str) -> Callable[[], None]:
    return lambda: function(name)


def _largest_difference(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))
