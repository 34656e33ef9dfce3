"""What the ranks of sharded parameters tell each other before a step writes anything.

In each step every rank says in one number whether something has changed or failed. Only if it did on one of
them, all prepare the step anew and add up their counts. Ranks of plain parameters say nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from ..masks.mask_hash import mask_hash
from ..sharding import Shards
from .amp import Amp

_BITS = 12
"""The bits of each answer in the number that is summed, over at most 4,095 ranks."""


class Answers(NamedTuple):
    """What a rank says before a step, each 0 or 1; of all ranks, how many say 1."""

    has_changed: int
    """The step has to be prepared anew."""
    has_failed: int
    """The step cannot be made."""
    is_left_out: int
    """An update of the masks leaves the step out."""
    has_overflowed: int
    """AMP skips the step."""
    only_makes_state: int
    """The step is made to have a state: see ``make_step.makes_state_alone``."""


class ShardedMask(NamedTuple):
    """A mask of a sharded parameter."""

    parameter: Parameter
    name: str
    """The name of the parameter."""
    mask: Tensor
    """The part of this rank, boolean."""
    neurons: int
    """The number of neurons of the whole parameter."""
    shards: Shards


def answers_of(is_same: bool, is_left_out: bool, amp: Amp, only_makes_state: bool) -> Answers:
    """Return what a rank says whose step has not failed so far."""
    return Answers(
        has_changed=int(not is_same),
        has_failed=0,
        is_left_out=int(is_left_out),
        has_overflowed=int(amp.found_inf is not None and amp.found_inf.item() != 0),
        only_makes_state=int(only_makes_state),
    )


def ask(shards: Sequence[Shards], look: Callable[[], Answers]) -> Answers:
    """Return the answers of all ranks: one sum of 8 bytes for each mesh, for which the host waits.

    Args:
        shards: the ranks.
        look: returns the answers of this rank. If it raises, all ranks are told.

    Returns:
        Each answer is 1 if it is so on some rank; ``only_makes_state``, on all of them.

    Raises:
        RuntimeError: another rank failed; or some ranks leave the step out, or see an overflow, and others do
            not.
    """
    try:
        own = look()
    except Exception:
        for ranks in shards:
            _sums(ranks, _FAILURE)
        raise
    found = own
    for ranks in shards:
        of_all = _sums(ranks, own)
        _check(of_all, ranks.world())
        found = Answers(*(max(*both) for both in zip(found, map(bool, of_all), strict=True)))
        if of_all.only_makes_state < ranks.world():
            own = own._replace(only_makes_state=0)
    return found._replace(only_makes_state=own.only_makes_state)


def _sums(ranks: Shards, own: Answers) -> Answers:
    """Return how many ranks of a mesh say so to each question."""
    number = sum(answer << (_BITS * i) for i, answer in enumerate(own))
    total = int(ranks.sums_of_all(ranks.integers(number)))
    return Answers(*((total >> (_BITS * i)) % (1 << _BITS) for i in range(len(own))))


def _check(of_all: Answers, ranks: int) -> None:
    if of_all.has_failed:
        raise RuntimeError(_FAILED)
    if of_all.is_left_out not in (0, ranks):
        raise RuntimeError(
            f"{of_all.is_left_out} of {ranks} ranks have updated their masks and leave this step out "
            "(skip_step), and the others have not: call dst.step() on every rank"
        )
    if of_all.has_overflowed not in (0, ranks):
        raise RuntimeError(
            f"{of_all.has_overflowed} of {ranks} ranks were told that gradients are not finite, and the "
            "others were not: found_inf must be the same on all ranks, as torch.amp.GradScaler makes it"
        )


class LayerTotals:
    """Adds up the active weights of sharded masks, once in each preparation, on all ranks.

    Args:
        shards: the ranks of all sharded parameters.
    """

    def __init__(self, shards: Sequence[Shards]) -> None:
        self.shards = shards
        self._is_open = True

    def mean_fan_in(self, masks: Sequence[ShardedMask]) -> dict[Parameter, float]:
        """Return the mean fan-in of each whole layer: one sum of active weights for each mesh.

        Of a complex parameter, it is that of the pairs of real numbers.

        Args:
            masks: all masks of sharded parameters that the optimizer has, in the same order on every rank.

        Raises:
            RuntimeError: the preparation failed on another rank, the ranks have different numbers of masks,
                or ranks that have the same rows have different masks (it names the layer).
        """
        self._is_open = False
        means: dict[Parameter, float] = {}
        for ranks in self.shards:
            own = [mask for mask in masks if mask.shards == ranks]
            _check_all_can(ranks, len(own))
            if own:
                counts = torch.stack([mask.mask.count_nonzero() for mask in own]).to(ranks.device())
                _check_replicas(own, ranks)
                for mask, active in zip(own, ranks.sums(counts).tolist(), strict=True):
                    numbers = 2 if mask.parameter.is_complex() else 1
                    means[mask.parameter] = numbers * active / max(1, mask.neurons)
        return means

    def fail(self) -> None:
        """Let the other ranks know that the preparation has failed on this one, if they wait for it."""
        if self._is_open:
            for ranks in self.shards:
                _most(ranks, [1, 0, 0])


@contextmanager
def layer_totals(shards: Sequence[Shards]) -> Iterator[LayerTotals]:
    """Give what adds up active weights. If the preparation fails before that, it fails on all ranks."""
    totals = LayerTotals(shards)
    try:
        yield totals
    except Exception:
        totals.fail()
        raise


def _check_all_can(ranks: Shards, masks: int) -> None:
    failed, most, least = _most(ranks, [0, masks, -masks])
    if failed:
        raise RuntimeError(_FAILED)
    if most != -least:
        raise RuntimeError(
            f"the ranks have from {-least} to {most} masks of sharded parameters, this one has {masks}: make "
            "the same masks on every rank"
        )


def _check_replicas(masks: Sequence[ShardedMask], ranks: Shards) -> None:
    """Raise ``RuntimeError`` on all ranks, naming the layer, if those of the same rows have other masks."""
    if not ranks.has_replicas():
        return
    own = ranks.integers([mask_hash(mask.mask) for mask in masks])
    most, least = ranks.most_of_replicas(torch.stack([own, ~own]))
    differ = ranks.most_of_all((most != ~least).to(torch.int64)).tolist()
    if any(differ):
        names = [repr(mask.name) for mask, differs in zip(masks, differ, strict=True) if differs]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise RuntimeError(
            f"the mask of {names[0]}{more} differs among ranks that have the same rows (replicas): whatever "
            "changes a mask must do so on every rank"
        )


def _most(ranks: Shards, numbers: Sequence[int]) -> list[int]:
    found: list[int] = ranks.most_of_all(ranks.integers(numbers)).tolist()
    return found


_FAILURE = Answers(has_changed=0, has_failed=1, is_left_out=0, has_overflowed=0, only_makes_state=0)
_FAILED = "no weight was changed in this step, because it failed on another rank, whose error says why"
