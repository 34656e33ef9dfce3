"""The contestants: optimizers whose steps are timed on the same weights, masks and gradients.

A contestant's ``step`` is timed. Its ``prepare`` is not: it restores the gradients that a step has written
into. ``checks`` checks the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ...correction import mask_factors
from ...neurons import Neurons
from ...optimizer import SparseOpt
from ..timing import Turn
from .network import Network

LR, MOMENTUM, WEIGHT_DECAY = 0.05, 0.9, 5e-4
WARMUP_STEPS = 5  # before the weights are compared, and the first step is timed

Work = Literal["sgd", "masked sgd", "sparseopt"]
"""The work of a contestant: SGD without masks, masked SGD, or masked SGD with the correction of Eq. 12."""
Implementation = Literal["fused", "foreach", "for-loop", "default"]
"""An implementation of ``torch.optim.SGD``."""


@dataclass
class Contestant:
    name: str
    network: Network
    step: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    work: Work = "sparseopt"
    steps_made: int = 0  # before the first one that is timed

    def turn(self, steps: int = 1) -> Turn:
        return Turn(self.step, self.prepare, steps)

    def warm_up(self) -> None:
        """Make ``WARMUP_STEPS`` steps in all."""
        while self.steps_made < WARMUP_STEPS:
            self.warm_up_step()

    def warm_up_step(self) -> None:
        self.prepare()
        self.step()
        self.steps_made += 1
        if self.network.parameters[0].is_cuda:
            torch.cuda.synchronize()  # so that an error of the device is raised for this contestant


Maker = Callable[[Network], Contestant]


def sparseopt(network: Network, backend: str = "auto", **options: Any) -> Contestant:
    """Return this package's step: correction, masks and update in one pass over memory.

    Args:
        network: its gradients are not written.
        backend: the backend of ``SparseOpt``.
        options: other options of ``SparseOpt``.
    """
    optimizer = SparseOpt(
        network.parameters,
        lr=LR,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        masks=network.masks,
        backend=backend,
        **options,
    )
    work: Work = "masked sgd" if options.get("correction") == "none" else "sparseopt"
    return Contestant(name="sparseopt", network=network, step=optimizer.step, work=work)


def sgd(
    network: Network,
    implementation: Implementation = "fused",
    max_grad_norm: float | None = None,
    nesterov: bool = False,
) -> Contestant:
    """Return PyTorch's SGD on dense weights. Without mask and correction it does less work than SparseOpt."""
    optimizer = _sgd(network, implementation, nesterov=nesterov)
    name = f"sgd {implementation}, no mask"
    if max_grad_norm is None:
        return Contestant(name=name, network=network, step=optimizer.step, work="sgd")
    network.own_gradients()
    foreach = implementation != "for-loop"

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(network.parameters, max_grad_norm, foreach=foreach)
        optimizer.step()

    return Contestant(name=name, network=network, step=step, work="sgd")


def eager_chain(
    network: Network,
    implementation: Implementation = "foreach",
    correct: bool = True,
    nesterov: bool = False,
) -> Contestant:
    """Return the simplest code without this package: scale the gradients by c_i, mask them by a boolean mask,
    step, mask the weights. Without ``correct`` the gradients are not scaled."""
    step = chain(network, implementation, correct=correct, nesterov=nesterov)
    return Contestant(
        name="eager chain", network=network, step=step, prepare=network.restore_gradients, work=_work(correct)
    )


def tuned_chain(
    network: Network, implementation: Implementation = "fused", correct: bool = True
) -> Contestant:
    """Return the fastest chain that is as simple: all tensors in one call, and ``c_i * mask`` as one factor
    of the weights' dtype, which PyTorch multiplies by faster than by a boolean mask.

    The weights are masked in each step, as code must do whose masks may change. With masks that stay the
    same, that pass over memory could be left out.
    """
    network.own_gradients()
    optimizer = _sgd(network, implementation)
    masked: list[Tensor] = list(network.masks)
    gradients: list[Tensor] = [p.grad for p in network.masks]  # type: ignore[misc]
    masks = [mask.to(p.dtype) for p, mask in network.masks.items()]
    factors = masks
    if correct:
        factors = [c * mask for c, mask in zip(correction_of(network), masks, strict=True)]

    @torch.no_grad()
    def step() -> None:
        if masked:
            torch._foreach_mul_(gradients, factors)
        optimizer.step()
        if masked:
            torch._foreach_mul_(masked, masks)

    name = "eager chain, tuned" + ("" if implementation == "fused" else f" (sgd {implementation})")
    return Contestant(
        name=name, network=network, step=step, prepare=network.restore_gradients, work=_work(correct)
    )


SGD: tuple[Callable[..., Contestant], ...] = (sgd, partial(sgd, implementation="foreach"))
"""Fused SGD, and foreach SGD as its substitute where the fused one is wrong."""
TUNED_CHAIN: tuple[Callable[..., Contestant], ...] = (
    tuned_chain,
    partial(tuned_chain, implementation="foreach"),
)
"""The tuned chain with fused SGD, and with foreach SGD as its substitute."""


def chain(
    network: Network, implementation: Implementation, *, correct: bool = True, nesterov: bool = False
) -> Callable[[], None]:
    """Return the step of ``eager_chain``. The factors c_i are computed once: the masks do not change."""
    network.own_gradients()
    optimizer = _sgd(network, implementation, nesterov=nesterov)
    factors = dict(zip(network.masks, correction_of(network), strict=True)) if correct else {}

    @torch.no_grad()
    def step() -> None:
        for p, mask in network.masks.items():
            assert p.grad is not None
            if correct:
                p.grad.mul_(factors[p])
            p.grad.mul_(mask)
        optimizer.step()
        for p, mask in network.masks.items():
            p.mul_(mask)

    return step


def correction_of(network: Network) -> list[Tensor]:
    """Return the factors c_i of each masked parameter, in its dtype, in the order of ``network.masks``."""
    return [mask_factors(mask, Neurons()).to(p.dtype) for p, mask in network.masks.items()]


def _work(correct: bool) -> Work:
    return "sparseopt" if correct else "masked sgd"


def _sgd(network: Network, implementation: Implementation, nesterov: bool = False) -> torch.optim.SGD:
    options: dict[Implementation, dict[str, bool]] = {
        "fused": {"fused": True},
        "foreach": {"foreach": True},
        "for-loop": {"foreach": False, "fused": False},
        "default": {},
    }
    return torch.optim.SGD(
        network.parameters,
        lr=LR,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        nesterov=nesterov,
        **options[implementation],
    )
