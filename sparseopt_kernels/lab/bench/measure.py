"""The time of a step on layers of given shapes, by sparsity, within a number of seconds."""

from __future__ import annotations

import gc
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..timing import Rounds, Summary, Turn, take_turns, timer_for
from ..training.errors import TrainingError
from .checks import References, admitted
from .contestants import SGD, TUNED_CHAIN, Maker, eager_chain, sparseopt
from .network import Network, Shape
from .training_pass import training_pass

RIVALS: tuple[tuple[Maker, ...], ...] = (SGD[:1], SGD[1:], TUNED_CHAIN, (eager_chain,))
_ROUNDS = Rounds(timed=60, warmup=1, fewest=3)
_PASSES = Rounds(timed=20, warmup=1)
_PASS_SECONDS = 5.0
# An upper bound for each weight: five contestants with weights, gradients and momentum; the factors of the
# tuned chain; the network that they are copied from; references; temporaries.
_NUMBERS_PER_WEIGHT = 40


@dataclass(frozen=True)
class Measured:
    """The times at one sparsity.

    Args:
        sparsity: in [0, 1).
        times: of a step, by contestant; empty if there was no time left.
        wrong: the contestants that are not timed, because their weights are wrong.
    """

    sparsity: float
    times: Mapping[str, Summary]
    wrong: Sequence[str] = ()


def measure(
    layers: Sequence[Shape],
    sparsities: Sequence[float],
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
    on_round: Callable[[float], object] = lambda elapsed: None,
) -> list[Measured]:
    """Check the contestants at each sparsity, and time those that are right.

    Args:
        layers: the shapes of the weights, which are masked at random.
        sparsities: of the masks, each in [0, 1).
        dtype: of the weights.
        device: a CPU or a CUDA device.
        seconds: the approximate time limit; each sparsity gets an equal share of the time that is left.
        on_round: called before each round with the seconds since the start.

    Raises:
        TrainingError: the device has too little memory.
    """
    _check_memory(sum(map(math.prod, layers)), dtype, device)
    timer = timer_for(device)
    start = time.monotonic()
    found = []
    for i, sparsity in enumerate(sparsities):
        begin = time.monotonic() - start
        if begin >= seconds:
            found.append(Measured(sparsity, {}))
            continue
        end = begin + (seconds - begin) / (len(sparsities) - i)

        def is_over(end: float = end) -> bool:
            elapsed = time.monotonic() - start
            on_round(elapsed)
            return elapsed > end

        with warnings.catch_warnings():
            # The warning is about training; here masks are random and nothing is trained.
            warnings.filterwarnings("ignore", ".*fan-in is concentrated")
            network = Network.of_shapes(layers, sparsity, device=device, dtype=dtype)
            right, wrong = admitted(network, [(sparseopt,), *RIVALS], References(network))
            del network
            gc.collect()
            turns = {contestant.name: contestant.turn() for contestant in right}
            found.append(Measured(sparsity, take_turns(turns, timer, _ROUNDS, is_over), wrong))
    return found


def measure_pass(
    layers: Sequence[Shape], batch: int, dtype: torch.dtype, device: torch.device
) -> Summary | None:
    """Time a forward and a backward pass of the layers; None where :func:`training_pass` returns None."""
    forward_and_backward = training_pass(layers, batch, dtype, device)
    if forward_and_backward is None:
        return None
    timer = timer_for(device)
    start = time.monotonic()
    turns = {"pass": Turn(forward_and_backward)}
    return take_turns(turns, timer, _PASSES, lambda: time.monotonic() - start > _PASS_SECONDS)["pass"]


def _check_memory(weights: int, dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cuda":
        available = torch.cuda.mem_get_info(device)[0]
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    needed = weights * _NUMBERS_PER_WEIGHT * dtype.itemsize
    if needed > available:
        raise TrainingError(
            f"--layers has {weights} weights: that takes about {needed / 2**30:.0f} GiB of memory, and "
            f"{device} has {available / 2**30:.0f}. Name fewer or smaller layers"
        )
