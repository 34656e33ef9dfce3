"""Dynamic sparse training: when masks change, by how much, and what is remembered of it (SET, RigL).

Which weights are chosen is in ``mask_update.py``, and how it is done for all layers in ``updates.py``.
Nothing here knows the optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from ..masks import Masks
from ..neurons import Neurons, correction_factors
from ..registered_masks import check_mask
from ..user_warning import warn
from .drop_schedules import DropSchedule, cosine
from .native_updates import NativeUpdates, supports
from .seeding import generator
from .updates import Layer, Ranking, TorchUpdates, Updates


class _DynamicTopology:
    """What SET and RigL share: all but the choice of the weights that grow."""

    _settings: ClassVar[tuple[str, ...]] = ("drop_fraction", "update_every", "stop_at")

    def __init__(
        self,
        masks: Mapping[Parameter, Tensor],
        drop_fraction: float,
        update_every: int,
        stop_at: float,
        drop_schedule: DropSchedule,
    ) -> None:
        if not masks:
            raise ValueError("masks is empty, it must have at least one masked parameter")
        if not 0.0 <= drop_fraction <= 1.0:
            raise ValueError(f"drop_fraction is {drop_fraction}, it must be in [0, 1]")
        if not (update_every >= 1 and update_every == int(update_every)):
            raise ValueError(f"update_every is {update_every}, it must be an integer of at least 1 (steps)")
        if not stop_at > 0.0:
            raise ValueError(f"stop_at is {stop_at}, it must be positive (steps)")
        if not callable(drop_schedule):
            raise TypeError(f"drop_schedule is {drop_schedule!r}, it must be a function of (step, stop_at)")
        if stop_at <= update_every:
            warn(
                f"stop_at is {stop_at} and update_every is {update_every} steps: the masks will never change"
            )
        names = {p: n for n, p in masks.named().items()} if isinstance(masks, Masks) else {}
        for layer, (parameter, mask) in enumerate(masks.items()):
            check_mask(mask, parameter, names.get(parameter, f"parameter {layer}"))
        self.masks = masks
        self.drop_fraction = float(drop_fraction)
        self.update_every = int(update_every)
        self.stop_at = float(stop_at)
        self.drop_schedule = drop_schedule
        self._step = 0
        self._due = False
        self._updated = False
        self._explored = [mask.clone() for mask in masks.values()]

    @property
    def updated(self) -> bool:
        """Whether the last call of :meth:`step` changed a mask.

        False when no update was due, when it was postponed, when every dropped weight grew again, and
        before the first call, also of a resumed run.
        """
        return self._updated

    @torch.no_grad()
    def step(self) -> None:
        """Count one training step, and update the masks if an update is due.

        Call it once per optimizer step: ``loss.backward(); dst.step(); opt.step()``. Whether a mask
        changed is in :attr:`updated`; the optimizer's step is due in either case.
        """
        self._updated = False
        step = self._step + 1
        due = self._due or step % self.update_every == 0
        updates = self._begin() if due and step < self.stop_at else None
        fraction = 0.0 if updates is None else self._drop_fraction_at(step)
        self._step = step
        self._due = due and updates is None
        if updates is not None:
            self._updated = any(self._grow(updates, self._numbers_to_drop(updates.active, fraction)))

    def _drop_fraction_at(self, step: int) -> float:
        factor = self.drop_schedule(step, self.stop_at)
        if not (isinstance(factor, Real) and 0.0 <= factor <= 1.0):
            raise ValueError(
                f"drop_schedule returned {factor!r} at step {step}, it must be a number in [0, 1]"
            )
        return self.drop_fraction * float(factor)

    def _begin(self) -> Updates | None:
        """The update that is due; None: it cannot be made in this step, because a gradient is not finite."""
        self._explored = [
            union.to(mask.device) for union, mask in zip(self._explored, self.masks.values(), strict=True)
        ]
        pairs = zip(self.masks.items(), self._explored, strict=True)
        layers = [Layer(parameter, mask, union) for (parameter, mask), union in pairs]
        updates = NativeUpdates(layers) if supports(layers) else TorchUpdates(layers)
        return updates if updates.rank(self._rankings(updates.active)) else None

    def _numbers_to_drop(self, active: list[int], fraction: float) -> list[int]:
        """Of each layer; 0 where nothing can grow."""
        return [
            int(fraction * count) if count < parameter.numel() and self._can_grow(parameter) else 0
            for parameter, count in zip(self.masks, active, strict=True)
        ]

    def _rankings(self, active: list[int]) -> list[Ranking]:
        """The gradients that must be finite, and how many weights may grow by them."""
        gradients = [parameter.grad for parameter in self.masks]
        return [Ranking(layer, g, at_most=0) for layer, g in enumerate(gradients) if g is not None]

    def _can_grow(self, parameter: Parameter) -> bool:
        raise NotImplementedError

    def _grow(self, updates: Updates, ks: list[int]) -> list[bool]:
        raise NotImplementedError

    @torch.no_grad()
    def exploration_rate(self) -> float:
        """R_m, the in-time over-parameterisation rate of Liu et al. (2021), in [0, 1].

        The number of weights that have been active at some time (in the initial masks, in any since, or
        now), divided by the number of elements of the masked parameters.
        """
        explored = self._explored_so_far()
        return sum(int(union.count_nonzero()) for union in explored) / max(
            1, sum(union.numel() for union in explored)
        )

    def _explored_so_far(self) -> list[Tensor]:
        # The current mask is there for those who write into their masks themselves.
        pairs = zip(self._explored, self.masks.values(), strict=True)
        return [union.to(mask.device) | mask for union, mask in pairs]

    def state_dict(self) -> dict[str, Any]:
        """All that a resume needs beside the model (whose buffers are the masks) and the optimizer.

        The settings, the number of steps, whether a postponed update is due, and, as a list of boolean
        tensors in the order of ``masks``, the weights explored so far. Python numbers, strings and
        tensors only: it survives ``torch.load(weights_only=True)``. ``drop_schedule`` is code and not
        among them: give the resumed run the same one.
        """
        settings = {name: getattr(self, name) for name in self._settings}
        return {**settings, "step": self._step, "due": self._due, "explored": self._explored_so_far()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where the run that made ``state_dict`` was: from here on, bit for bit the same.

        The settings are replaced by the saved ones, as in PyTorch's optimizers and schedulers. The masks
        themselves come with the model's ``state_dict`` (or are the caller's to restore).

        Raises:
            ValueError: ``state_dict`` is another class's, or of masks of other shapes.
        """
        expected = {*self._settings, "step", "due", "explored"}
        if set(state_dict) != expected:
            raise ValueError(f"state_dict has keys {sorted(state_dict)}, it must have {sorted(expected)}")
        dtypes = {union.dtype for union in state_dict["explored"]}
        if dtypes != {torch.bool}:
            raise ValueError(f"state_dict['explored'] has tensors of {dtypes}, they must be torch.bool")
        shapes = [tuple(union.shape) for union in state_dict["explored"]]
        own_shapes = [tuple(union.shape) for union in self._explored]
        if shapes != own_shapes:
            raise ValueError(f"state_dict has masks of shapes {shapes}, they must be {own_shapes}")
        for name in self._settings:
            setattr(self, name, state_dict[name])
        self._step = state_dict["step"]
        self._due = state_dict["due"]
        self._updated = False
        pairs = zip(state_dict["explored"], self.masks.values(), strict=True)
        self._explored = [union.clone().to(mask.device) for union, mask in pairs]


class SET(_DynamicTopology):
    """Sparse evolutionary training (Mocanu et al. 2018): drop by magnitude, grow at random.

    ``loss.backward(); dst.step(); opt.step()``: call it once per optimizer step. Step ``t`` (1 for the
    first call) updates the masks when ``t`` is a multiple of ``update_every`` and ``t < stop_at``. In
    each layer the ``int(f(t) * nnz)`` active weights of smallest magnitude are dropped, with
    ``f(t) = drop_fraction * drop_schedule(t, stop_at)``, and as many are grown, uniformly at random among
    all those not kept. So ``nnz`` of a layer never changes. A weight that was just dropped may grow
    again, and then keeps its value; one that becomes active starts at 0.

    The masks are written in place, and weights that left the mask or are new in it are zeroed. The optimizer
    is not touched: ``SparseOpt`` sees the write and clears the momentum of what was dropped.

    On a CPU, with the native library, an update takes a few passes over memory. Elsewhere PyTorch does it,
    with the same results.

    A non-finite gradient on a masked parameter (the overflow of a loss scale) postpones the update to
    the next step whose gradients are finite: nothing is dropped, grown or drawn. A parameter that does
    not require a gradient keeps its mask. No other use is made of gradients.

    The random choices depend on (``seed``, layer, step) alone, and are drawn on the CPU: they are the
    same on every device, on every rank of a distributed run, and after a resume.

    Args:
        masks: boolean masks (True = active) by parameter, a :class:`Masks` or a dict.
        drop_fraction: fraction of the active weights that an update drops, in [0, 1], before
            ``drop_schedule`` makes it smaller.
        update_every: steps between updates.
        stop_at: step from which on the masks stay as they are; 0.75 of all steps is usual (RigL).
            ``math.inf`` for a constant fraction and no end.
        drop_schedule: a callable that is given the step ``t`` (int) and ``stop_at`` (float) once per
            update, and returns the factor in [0, 1] of ``drop_fraction``. The default is
            ``(1 + cos(pi * t / stop_at)) / 2`` (RigL, Eq. 1); it is in ``topology.drop_schedules``, and
            so is ``constant``. In a distributed run it must return the same on every rank. It is code,
            hence not part of ``state_dict()``.
        seed: of the random choices.

    Raises:
        ValueError: an argument is out of range, ``masks`` is empty, or a mask is not boolean or not of
            its parameter's shape. From ``step()``, before anything is written: ``drop_schedule`` did not
            return a number in [0, 1].
        TypeError: ``drop_schedule`` cannot be called.
    """

    _settings = (*_DynamicTopology._settings, "seed")

    def __init__(
        self,
        masks: Mapping[Parameter, Tensor],
        drop_fraction: float = 0.3,
        update_every: int = 100,
        *,
        stop_at: float,
        drop_schedule: DropSchedule = cosine,
        seed: int = 0,
    ) -> None:
        super().__init__(masks, drop_fraction, update_every, stop_at, drop_schedule)
        self.seed = int(seed)

    def _can_grow(self, parameter: Parameter) -> bool:
        # What grows in a frozen parameter would stay 0.
        return parameter.requires_grad

    def _grow(self, updates: Updates, ks: list[int]) -> list[bool]:
        return updates.grow_random(ks, [generator(self.seed, layer, self._step) for layer in range(len(ks))])


class RigL(_DynamicTopology):
    """Rigging the lottery (Evci et al. 2020): drop by magnitude, grow where the gradient is largest.

    ``loss.backward(); dst.step(); opt.step()``: call it once per optimizer step, while the gradients of
    that step are there. When masks change, how many weights drop, and what happens to the parameter and
    to the optimizer is as in :class:`SET`; but the weights that grow are those of largest dense gradient
    among all those not kept. Of equal gradients, a weight that was just dropped comes before an inactive
    one, and then the lower index first. Nothing is left to chance: there is no seed.

    Only the ranking counts: a loss scale need not be undone first. Gradients accumulated over
    micro-batches are ranked as they are summed. Gradients must be averaged over the ranks before the
    call, as ``DistributedDataParallel`` does in ``backward``; then every rank grows the same weights.

    A non-finite gradient on a masked parameter postpones the update to the next step whose gradients are
    finite. A parameter without a gradient (frozen, or unused in this step) keeps its mask.

    Args:
        masks, drop_fraction, update_every, stop_at, drop_schedule: as in :class:`SET`.
        regrow: ``"original"`` ranks by ``|p.grad|``, which the paper found better; ``"corrected"`` by
            ``c_i * |p.grad|`` with ``c_i = sqrt(fan_in_i / mean fan-in)`` of the mask before the update,
            the gradient that SparseOpt applies (Section 5.2, Figures 5 and 10). There, a neuron without
            active weights has ``c_i = 0`` and so grows last.

    Raises:
        ValueError: as in :class:`SET`, or ``regrow`` is unknown.
        TypeError: as in :class:`SET`.
        RuntimeError: from ``step()``, when an update is due and no masked parameter has a gradient.
    """

    _settings = (*_DynamicTopology._settings, "regrow")

    def __init__(
        self,
        masks: Mapping[Parameter, Tensor],
        drop_fraction: float = 0.3,
        update_every: int = 100,
        *,
        stop_at: float,
        drop_schedule: DropSchedule = cosine,
        regrow: Literal["original", "corrected"] = "original",
    ) -> None:
        if regrow not in ("original", "corrected"):
            raise ValueError(f"regrow is {regrow!r}, it must be 'original' or 'corrected'")
        super().__init__(masks, drop_fraction, update_every, stop_at, drop_schedule)
        self.regrow = regrow

    def _rankings(self, active: list[int]) -> list[Ranking]:
        at_most = self._numbers_to_drop(active, self.drop_fraction)
        rankings = [ranking._replace(at_most=at_most[ranking.layer]) for ranking in super()._rankings(active)]
        if not rankings:
            raise RuntimeError(
                "RigL ranks by gradients and no masked parameter has one: "
                "call step() after loss.backward() and before opt.zero_grad()"
            )
        if self.regrow == "original":
            return rankings
        factors = [self._factors(*item) for item in self.masks.items()]
        return [ranking._replace(factors=factors[ranking.layer]) for ranking in rankings]

    def _factors(self, parameter: Parameter, mask: Tensor) -> Tensor:
        neurons = self.masks.neurons(parameter) if isinstance(self.masks, Masks) else Neurons()
        return correction_factors(mask, neurons)

    def _can_grow(self, parameter: Parameter) -> bool:
        return parameter.grad is not None

    def _grow(self, updates: Updates, ks: list[int]) -> list[bool]:
        return updates.grow_largest(ks)
