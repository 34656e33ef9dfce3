"""SparseOpt and its rivals on one network: made, checked against the reference, timed in turns on the CPU."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from contestants import Contestant, Network, reference_weights, sparseopt
from networks import Shape

from sparseopt_kernels.timing import CpuTimer, Rounds, Summary, copied_gb_per_s, copying, take_turns

OURS = "sparseopt"  # the name of this package among the contestants
THREADS = 2
_CACHE_LINE = 64  # bytes

Maker = Callable[[Network], Contestant]


@dataclass(frozen=True)
class Case:
    """What is stepped on.

    Args:
        network: its name in tables and files.
        shapes: of the parameters; those of two and more dimensions are masked.
        sparsity: of each masked parameter.
        dtype: of the parameters.
        options: of ``SparseOpt``, beside those that all contestants have.
    """

    network: str
    shapes: Sequence[Shape]
    sparsity: float
    dtype: torch.dtype = torch.float32
    options: Mapping[str, Any] = field(default_factory=dict)

    def make(self) -> Network:
        return Network.of_shapes(self.shapes, self.sparsity, dtype=self.dtype)


@dataclass(frozen=True)
class Comparison:
    """What was measured on one network at one sparsity."""

    network: str
    sparsity: float
    weights: int
    floor_bytes: int  # that a step of SparseOpt must touch
    copy_gb_per_s: float
    times: Mapping[str, Summary]  # by contestant


def entrants(case: Case, rivals: Sequence[Maker]) -> list[Contestant]:
    """SparseOpt and its rivals, each with weights and gradients of its own, warmed up."""
    return _on(case.make(), case, rivals)


def checked_entrants(case: Case, rivals: Sequence[Maker]) -> list[Contestant]:
    """The same, compared with the reference backend.

    Raises:
        AssertionError: the weights of one are not those of the reference.
    """
    network = case.make()
    found = _on(network, case, rivals)
    want = reference_weights(network, **case.options)
    for contestant in found:
        contestant.check(want)
    return found


def _on(network: Network, case: Case, rivals: Sequence[Maker]) -> list[Contestant]:
    found = []
    for make in (lambda own: sparseopt(own, **case.options), *rivals):
        own = network.copy()
        own.own_gradients()  # one that is shared would be in the cache for all but the first of a round
        found.append(make(own))
        found[-1].warm_up()
    return found


def timed(
    case: Case, contestants: Sequence[Contestant], rounds: Rounds, steps: int = 1, seconds: float = math.inf
) -> Comparison:
    """Let them take turns of ``steps`` steps, SparseOpt first; for no longer than ``seconds``, once there
    were the fewest of ``rounds``."""
    gc.collect()
    ours = contestants[0]
    nbytes = sum(p.nbytes for p in ours.network.parameters)
    turns = {contestant.name: contestant.turn(steps) for contestant in contestants}
    end = time.monotonic() + seconds
    times = take_turns({**turns, "copy": copying(nbytes)}, CpuTimer(), rounds, lambda: time.monotonic() > end)
    copy = times.pop("copy")
    return Comparison(
        network=case.network,
        sparsity=case.sparsity,
        weights=ours.network.numel(),
        floor_bytes=ours.floor_bytes(_CACHE_LINE),
        copy_gb_per_s=copied_gb_per_s(nbytes, copy),
        times=times,
    )
