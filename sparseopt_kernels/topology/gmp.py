"""Gradual magnitude pruning: masks that lose weights on a schedule, and never grow any.

Its life is in ``dynamic_sparse_training.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor
from torch.nn.parameter import Parameter

from ..masks.mapping import active_weights
from .agreement import Group
from .densities import Distribution, check_request, densities_by_pattern, layer_densities
from .dynamic_sparse_training import DynamicSparseTraining
from .hooks import Counts, Layer
from .method_arguments import check_min_fan_in


def cubic_density(initial: float, final: float, progress: float) -> float:
    """Return the density ``d_f + (d_i - d_f)(1 - progress)^3`` of a layer at that part of the schedule.

    It is Eq. 1 of Zhu and Gupta (2017), ``s_t = s_f + (s_i - s_f)(1 - (t - t_0) / (n dt))^3``, of the density
    ``1 - s``. ``progress`` is ``(t - t_0) / (n dt)``; below 0 and above 1 nothing changes.
    """
    return final + (initial - final) * (1.0 - min(1.0, max(0.0, progress))) ** 3


class GMP(DynamicSparseTraining):
    """Gradual magnitude pruning (Zhu and Gupta 2017): drop the smallest weights until few are left.

    ``loss.backward(); dst.step(); opt.step()``: call it once per optimizer step. Pruning starts from the
    masks as they are (``sparsify(model, 0.0)`` makes dense ones) and ends at ``stop_at``, where each layer
    has ``round((1 - s_f) * numel)`` active weights, at least 1, ``s_f`` being its final sparsity. In step
    ``t`` between them, its sparsity is ``s_t = s_f + (s_i - s_f)(1 - (t - start_at) / (stop_at -
    start_at))^3``: pruning is quick at first and then slower and slower. Masks are updated when
    ``t - start_at`` is a multiple of ``update_every``, and in the first step that is not before ``stop_at``.

    The active weights of smallest magnitude in each layer are dropped: they leave the mask and become 0. They
    never return, and nothing grows. ``exploration_rate()`` is therefore the density at the start.

    Gradients have no influence, and an update is never postponed: where AMP skips the optimizer's step
    because of an overflow, the weights are pruned as they are. A parameter that does not require a gradient
    is pruned as well.

    Args:
        masks: as in :class:`SET`.
        sparsity: the fraction of the masks' weights that is inactive at the end, in [0, 1); or by layer, as
            ``{"layer1.*": 0.8, "fc": 0.5}``: names of layers or weights, or shell-style patterns. The first
            that matches counts, and a layer that none matches keeps its mask.
        update_every: steps between updates.
        start_at: the last step before pruning starts (``t_0``).
        stop_at: the step at which the final sparsity is reached, greater than ``start_at`` and not infinite.
        distribution: how layers share the final sparsity: ``"uniform"`` (all have it, as in the paper),
            ``"er"`` or ``"erk"``, as in :func:`layer_densities`.
        min_fan_in: how many inputs every neuron keeps, or as many as it has at the start.
        process_group: as in :class:`SET`.

    Raises:
        ValueError: an argument is out of range, ``masks`` is empty, a mask does not fit its parameter, a
            pattern matches nothing, or a layer has fewer active weights at the start than at the end, or
            at the end fewer than ``min_fan_in`` for each of its neurons.
        TypeError: a key of ``masks`` is not a parameter.
        RuntimeError: from ``step()``, after an update: the ranks of a distributed run do not agree.
    """

    settings: ClassVar[tuple[str, ...]] = (
        *("sparsity", "distribution", "start_at", "update_every", "stop_at", "min_fan_in"),
        "initial_active",
    )
    shown: ClassVar[tuple[str, ...]] = ("sparsity", *DynamicSparseTraining.shown)
    postpones = False

    def __init__(
        self,
        masks: Mapping[Parameter, Tensor],
        sparsity: float | Mapping[str, float],
        update_every: int = 100,
        *,
        start_at: int = 0,
        stop_at: float,
        distribution: Distribution = "uniform",
        min_fan_in: int = 0,
        process_group: Group = "world",
    ) -> None:
        super().__init__(
            masks,
            update_every,
            start_at=start_at,
            stop_at=stop_at,
            skip_step=False,
            min_fan_in=min_fan_in,
            process_group=process_group,
        )
        _check_end(start_at, stop_at)
        self.sparsity = dict(sparsity) if isinstance(sparsity, Mapping) else float(sparsity)
        self.distribution = distribution
        self.initial_active = active_weights(masks)
        self._check_final()

    def next_update(self, step: int) -> int | None:
        """Return the next of the steps ``start_at + i * update_every``, or the first from ``stop_at`` on."""
        last = math.ceil(self.stop_at)
        passed = max(0, step - self.start_at) // self.update_every
        return min(self.start_at + (passed + 1) * self.update_every, last) if step < last else None

    def can_change(self, layer: Layer) -> bool:
        """Return True: a layer that does not require a gradient is pruned as well."""
        return True

    def counts(self, layers: Sequence[Layer], step: int) -> list[Counts]:
        """Return for each layer what it has more than the schedule allows, and no growth."""
        allowed = self._counts_at((step - self.start_at) / (self.stop_at - self.start_at))
        return [Counts(drop=max(0, layer.active - allowed[layer.index])) for layer in layers]

    def _counts_at(self, progress: float) -> list[int]:
        """Return how many weights of each layer are active at that part of the schedule."""
        counts = []
        layers = zip(self.masks, self.initial_active, self._final_densities(), strict=True)
        for parameter, initial, final in layers:
            numel = parameter.numel()
            density = None if final is None else cubic_density(initial / max(1, numel), final, progress)
            counts.append(initial if density is None else max(min(1, numel), round(density * numel)))
        return counts

    def _final_densities(self) -> list[float | None]:
        """Return the final density of each layer; None: its mask stays."""
        if isinstance(self.sparsity, dict):
            # "uniform" is the default, and says nothing of one layer.
            check_request(self.sparsity, None if self.distribution == "uniform" else self.distribution)
            found = densities_by_pattern({n: (n, n.rpartition(".")[0]) for n in self._names}, self.sparsity)
            return [found.get(name) for name in self._names]
        check_request(self.sparsity, self.distribution)
        if self.distribution == "uniform":
            return [1.0 - self.sparsity] * len(self._names)
        shapes = {n: tuple(p.shape) for n, p in zip(self._names, self.masks, strict=True)}
        densities = layer_densities(shapes, self.sparsity, self.distribution)
        return [densities[name] for name in self._names]

    def _check_final(self) -> None:
        final = self._counts_at(1.0)
        for name, initial, count in zip(self._names, self.initial_active, final, strict=True):
            if initial < count:
                raise ValueError(
                    f"{name!r} has {initial} active weights and would have {count} at the end: GMP only "
                    "prunes. Start from denser masks (sparsify(model, 0.0)), or give each layer its sparsity"
                )
        check_min_fan_in(self.min_fan_in, self.masks, self._names, final)

    def _check_settings(self) -> None:
        super()._check_settings()
        _check_end(self.start_at, self.stop_at)
        self._final_densities()


def _check_end(start_at: int, stop_at: float) -> None:
    if not start_at < stop_at < math.inf:
        raise ValueError(f"stop_at is {stop_at}, it must be finite and over start_at ({start_at})")
