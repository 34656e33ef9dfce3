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
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ...topology.sparsify import sparsify
from ..bench.checks import WRONG, References, admitted
from ..bench.contestants import SGD, TUNED_CHAIN, Contestant, Maker, eager_chain, sparseopt
from ..bench.network import Network
from ..timing import QUIET, CpuTimer, CudaTimer, Rounds, Summary, Turn, processor_share, take_turns
from ..training.data import Dataset, split_order
from ..training.errors import TrainingError
from ..training.models import mlp

BY_HAND, TUNED, DENSE, PLAIN, CORRECTED = "by-hand", "by-hand-tuned", "dense", "sgd", "sparseopt"
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
        wrong: contestants that are not timed, because their weights are wrong; another stood in for each.
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
    wrong: tuple[str, ...] = ()

    @property
    def is_reliable(self) -> bool:
        """Whether the machine was quiet. If not, threads wait for one another, and times are not those of
        their work: more so the more parallel regions a step has."""
        return self.processor_share >= QUIET


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
    chosen, wrong = _checked(model)
    start = [p.detach().clone() for p in model.parameters()]
    gradients = [torch.zeros_like(p) for p in start]  # of all: each batch writes into them
    models = {name: deepcopy(model) for name in chosen}
    contestants = {name: _contestant(chosen[name], models[name], gradients) for name in chosen}
    give = _gradients(models[PLAIN], dataset, size.batch_size)
    steps = 0
    steps_of: Counter[str] = Counter()

    def prepare(name: str) -> None:
        nonlocal steps
        if steps_of[name] == steps:  # the first of a round
            for own, gradient in zip(gradients, next(give), strict=True):
                own.copy_(gradient)
            steps += 1
        steps_of[name] += 1
        contestants[name].network.restore_gradients()

    turns = {name: Turn(c.step, _called_with(prepare, name)) for name, c in contestants.items()}
    timer = CudaTimer(device) if device.type == "cuda" else CpuTimer()
    before = processor_share()
    end = time.monotonic() + size.seconds
    times = take_turns(turns, timer, size.rounds, lambda: time.monotonic() > end)
    by_hand = _weights(models[BY_HAND])
    return StepTimes(
        times,
        sum(mask.numel() for mask in masks.values()),
        masks.sparsity(),
        torch.get_num_threads(),
        steps,
        _largest_difference(by_hand, _weights(models[PLAIN])),
        _largest_difference(by_hand, start),
        min(before, processor_share()),
        wrong,
    )


# In the order of a round: PLAIN's network gives the gradients of the next one when it has made its step.
_MAKERS: dict[str, tuple[Maker, ...]] = {
    BY_HAND: (partial(eager_chain, implementation="default", correct=False),),
    TUNED: tuple(partial(make, correct=False) for make in TUNED_CHAIN),
    DENSE: SGD,
    PLAIN: (partial(sparseopt, correction="none"),),
    CORRECTED: (sparseopt,),
}


def _checked(model: nn.Module) -> tuple[dict[str, Maker], tuple[str, ...]]:
    """Return the maker of each contestant, the first of ``_MAKERS`` whose steps on the model's parameters are
    right, and the names of those that are wrong.

    Raises:
        TrainingError: none of a contestant's makers is right.
    """
    generator = torch.Generator().manual_seed(_SEED)
    gradients = [torch.randn(p.shape, generator=generator).to(p) for p in model.parameters()]
    network = Network.of_model(deepcopy(model), gradients)
    references = References(network)
    chosen: dict[str, Maker] = {}
    wrong: list[str] = []
    for name, makers in _MAKERS.items():
        for make in makers:
            found = admitted(network, [(make,)], references)
            wrong += found.wrong
            if found.right:
                chosen[name] = make
                break
        else:
            raise TrainingError(f"{name} has {WRONG}: run sparseopt doctor, and please report its output", 1)
    return chosen, tuple(wrong)


def _contestant(make: Maker, model: nn.Module, gradients: list[Tensor]) -> Contestant:
    network = Network.of_model(model, gradients)
    network.own_gradients()
    return make(network)


def _weights(model: nn.Module) -> list[Tensor]:
    return [p.detach() for p in model.parameters()]


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
