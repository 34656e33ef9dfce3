"""Times optimizer steps on a network that is large enough for the step to matter.

All contestants take the same steps in turn, with the same gradients of the same batches of real data.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
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
from ..timing import QUIET, Rounds, Summary, Turn, processor_share, take_turns, timer_for
from ..training.data import Dataset, split_order
from ..training.errors import TrainingError
from ..training.models import mlp

BY_HAND, TUNED, DENSE, PLAIN, CORRECTED = "by-hand", "by-hand-tuned", "dense", "sgd", "sparseopt"
_SEED = 0


@dataclass(frozen=True)
class Size:
    """The size of the network and of the measurement."""

    hidden: tuple[int, ...] = (2048, 2048, 2048)
    sparsity: float = 0.95
    batch_size: int = 64
    rounds: Rounds = field(default_factory=lambda: Rounds(timed=60, warmup=3, fewest=5))
    seconds: float = 40.0  # no round starts later than this


@dataclass(frozen=True)
class StepTimes:
    """The result of :func:`measure`.

    Args:
        times: by contestant: ``BY_HAND``, ``TUNED``, ``DENSE``, ``PLAIN`` and ``CORRECTED``.
        weights: the number of weights under masks, active or not.
        sparsity: of the masks, in [0, 1).
        threads: of PyTorch.
        steps: the number of steps of each contestant.
        difference: the largest absolute difference between the final weights of ``BY_HAND`` and ``PLAIN``.
        moved: the largest absolute change of a weight of ``BY_HAND`` from the start to the end.
        processor_share: the share of a processor that other programs left just before and after, in [0, 1].
        wrong: contestants that are not timed, because their weights are wrong; each was replaced by another.
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
        """True if the machine was quiet. On a busy one, threads wait for one another at the end of each
        parallel region, and the times show these waits."""
        return self.processor_share >= QUIET


def measure(dataset: Dataset, size: Size) -> StepTimes:
    """Train an MLP on the data set for some steps with each contestant, and time the steps.

    All get the gradients of ``PLAIN``'s network, dense, as ``backward()`` leaves them. Batches, initial
    weights and masks are the same in every call.

    Raises:
        TrainingError: none of a contestant's makers is right.
    """
    device = dataset.train_images.device
    pixels = dataset.train_images[0].numel()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = mlp(pixels, dataset.num_classes, size.hidden).to(device)
    masks = sparsify(model, size.sparsity, "uniform", seed=_SEED)
    chosen, wrong = _checked(model)
    start = [p.detach().clone() for p in model.parameters()]
    gradients = [torch.zeros_like(p) for p in start]  # shared by all; each batch writes into them
    models = {name: deepcopy(model) for name in chosen}
    contestants = {name: _contestant(chosen[name], models[name], gradients) for name in chosen}
    give = _gradients(models[PLAIN], dataset, size.batch_size)
    steps = 0
    steps_of: Counter[str] = Counter()

    def prepare(name: str) -> None:
        nonlocal steps
        if steps_of[name] == steps:  # the first contestant of a round
            for own, gradient in zip(gradients, next(give), strict=True):
                own.copy_(gradient)
            steps += 1
        steps_of[name] += 1
        contestants[name].network.restore_gradients()

    turns = {name: Turn(c.step, partial(prepare, name)) for name, c in contestants.items()}
    timer = timer_for(device)
    before = processor_share()
    end = time.monotonic() + size.seconds
    times = take_turns(turns, timer, size.rounds, lambda: time.monotonic() > end)
    by_hand = _weights(models[BY_HAND])
    return StepTimes(
        times=times,
        weights=sum(mask.numel() for mask in masks.values()),
        sparsity=masks.sparsity(),
        threads=torch.get_num_threads(),
        steps=steps,
        difference=_largest_difference(by_hand, _weights(models[PLAIN])),
        moved=_largest_difference(by_hand, start),
        processor_share=min(before, processor_share()),
        wrong=wrong,
    )


# The alternatives for each contestant; the first whose steps are right is timed.
_MAKERS: dict[str, tuple[Maker, ...]] = {
    BY_HAND: (partial(eager_chain, implementation="default", correct=False),),
    TUNED: tuple(partial(make, correct=False) for make in TUNED_CHAIN),
    DENSE: SGD,
    PLAIN: (partial(sparseopt, correction="none"),),
    CORRECTED: (sparseopt,),
}


def _checked(model: nn.Module) -> tuple[dict[str, Maker], tuple[str, ...]]:
    """Return for each contestant the first of its ``_MAKERS`` whose steps on the model's parameters are
    right, and the names of the wrong ones.

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
    """Yield the gradients of ``model``, with its current weights, on one batch after another, without end."""
    generator = torch.Generator().manual_seed(_SEED)
    while True:
        order = torch.randperm(len(dataset.train_labels), generator=generator)
        for indices in split_order(order, batch_size):
            images, labels = dataset.train_images[indices], dataset.train_labels[indices]
            loss = F.cross_entropy(model(images), labels)
            yield list(torch.autograd.grad(loss, list(model.parameters())))


def _largest_difference(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))
