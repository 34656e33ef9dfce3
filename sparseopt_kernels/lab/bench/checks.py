"""Checks the weights of contestants: only those with right results are timed.

``torch.optim.SGD(fused=True)`` of PyTorch 2.13.0 leaves most weights of bfloat16 and float16 unwritten on a
CPU (pytorch/pytorch#191763), and is fast at it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .contestants import WARMUP_STEPS, Contestant, Maker, Work, chain, sgd, sparseopt
from .network import Network

WRONG = "wrong results"  # the status of a contestant that is not timed for that reason
# rtol and atol of the weights after the warm-up, by dtype: they allow for some roundings in each step.
_TOLERANCES = {
    torch.float64: (1e-9, 1e-10),
    torch.float32: (1e-4, 1e-5),
    torch.float16: (5e-3, 5e-3),
    torch.bfloat16: (4e-2, 4e-2),
}


class References:
    """The right weights after a warm-up, for each kind of work; each is computed at its first use.

    The oracle is the for-loop of ``torch.optim.SGD``, in float32 at least, with masks applied in plain
    PyTorch. If there are options that PyTorch does not have, it is the reference backend.

    Args:
        network: the network that contestants start from. It is not written.
        options: the options of ``SparseOpt`` that contestants of the work ``"sparseopt"`` have. SGD takes
            ``nesterov`` and ``max_grad_norm`` of them.
    """

    def __init__(self, network: Network, options: Mapping[str, Any] | None = None) -> None:
        self._network = network
        self._options = dict(options or {})
        self._weights: dict[Work, list[Tensor]] = {}

    def weights(self, work: Work) -> list[Tensor]:
        if work not in self._weights:
            contestant = self._contestant(work)
            contestant.warm_up()
            self._weights[work] = [p.detach() for p in contestant.network.parameters]
        return self._weights[work]

    def are_met_by(self, contestant: Contestant) -> bool:
        """Tell if the weights of a warmed-up contestant are close to the right ones of its work."""
        want = self.weights(contestant.work)
        found = [p.detach() for p in contestant.network.parameters]
        return all(_is_close(p, q) for p, q in zip(found, want, strict=True))

    def _contestant(self, work: Work) -> Contestant:
        dtype = self._network.parameters[0].dtype
        own = self._network.copy(torch.promote_types(dtype, torch.float32))
        known = {key: self._options[key] for key in ("nesterov",) if key in self._options}
        if work == "sgd":
            limit = {key: self._options[key] for key in ("max_grad_norm",) if key in self._options}
            return sgd(own, "for-loop", **known, **limit)
        if self._options.keys() - known.keys():
            options = {**self._options, **({"correction": "none"} if work == "masked sgd" else {})}
            return sparseopt(self._network.copy(), "reference", **options)
        step = chain(own, "for-loop", correct=work == "sparseopt", **known)
        return Contestant(name="reference", network=own, step=step, prepare=own.restore_gradients, work=work)


class Admitted(NamedTuple):
    right: list[Contestant]
    """The contestants whose weights are right. They are warmed up."""
    wrong: list[str]
    """The names of the contestants whose weights are wrong. They are not timed."""


def admitted(network: Network, rivals: Iterable[Sequence[Maker]], references: References) -> Admitted:
    """Make contestants, each with weights and gradients of its own, and check them.

    Args:
        network: the network that they start from.
        rivals: alternatives for each contestant; the first whose weights are right is admitted.
        references: the right weights of ``network``.
    """
    untried = [list(alternatives) for alternatives in rivals]
    right: list[Contestant | None] = [None] * len(untried)
    wrong: list[str] = []
    while places := [i for i, found in enumerate(right) if found is None and untried[i]]:
        contestants = {i: _made(untried[i].pop(0), network) for i in places}
        _warm_up_by_turns(contestants.values())
        for i, contestant in contestants.items():
            if references.are_met_by(contestant):
                right[i] = contestant
            else:
                wrong.append(contestant.name)
    return Admitted([contestant for contestant in right if contestant is not None], wrong)


def _made(make: Maker, network: Network) -> Contestant:
    own = network.copy()
    own.own_gradients()  # shared ones would be in the cache for all but the first of a round
    return make(own)


def _warm_up_by_turns(contestants: Collection[Contestant]) -> None:
    """Warm up as it is timed: SparseOpt's first steps decide how the others go, and steps in a row find in
    the caches what they do not find later."""
    for _ in range(WARMUP_STEPS):
        for contestant in contestants:
            if contestant.steps_made < WARMUP_STEPS:
                contestant.warm_up_step()


def _is_close(found: Tensor, want: Tensor) -> bool:
    rtol, atol = _TOLERANCES[found.dtype]
    return torch.allclose(found.to(want.dtype), want, rtol=rtol, atol=atol)
