"""Dynamic sparse training that drops weights and grows as many: SET and RigL.

The clock and the memory of both are in ``dynamic_topology.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.nn.parameter import Parameter

from ..correction import mask_factors
from ..masks.mapping import neurons_in
from ..masks.registered_masks import as_boolean
from ..skipped_steps import SkippedStep
from ..user_warning import warn
from .agreement import Group
from .drop_schedules import DropSchedule, cosine
from .dynamic_topology import DynamicTopology
from .layer_update import LayerUpdate
from .seeding import generator
from .updates import Ranking, Updates

_PRUNED_BY_PYTORCH = (
    "{name!r} was pruned by torch.nn.utils.prune, which multiplies it by its mask in every forward pass: "
    "inactive weights have no gradient, and RigL cannot rank them. For each such layer: "
    "mask = layer.{own}_mask.bool(); torch.nn.utils.prune.remove(layer, {own!r}); "
    "layer.register_buffer('{own}_mask', mask). Then make Masks(model) anew. SET works without that"
)


def _is_concentrated(update: LayerUpdate, neurons: int) -> bool:
    """Tell if one neuron got over a third of what grew, at least 20 weights, and ten times an even share."""
    most = update.most_grown
    return 3 * most > update.grown and most >= 20 and most * neurons >= 10 * update.grown


class _DropAndGrow(DynamicTopology):
    """SET and RigL but for the choice of the weights that grow."""

    _settings = ("drop_fraction", "skip_step", *DynamicTopology._settings)
    _shown = ("drop_fraction", *DynamicTopology._shown)
    _shown_unless = (*DynamicTopology._shown_unless, ("skip_step", True))
    _formerly: ClassVar[dict[str, Any]] = {**DynamicTopology._formerly, "skip_step": False}

    def __init__(
        self,
        masks: Mapping[Parameter, Tensor],
        drop_fraction: float,
        update_every: int,
        stop_at: float,
        drop_schedule: DropSchedule,
        skip_step: bool,
        min_fan_in: int,
        process_group: Group,
    ) -> None:
        if not 0.0 <= drop_fraction <= 1.0:
            raise ValueError(f"drop_fraction is {drop_fraction}, it must be in [0, 1]")
        if not callable(drop_schedule):
            raise TypeError(f"drop_schedule is {drop_schedule!r}, it must be a function of (step, stop_at)")
        if not isinstance(skip_step, bool):
            raise TypeError(f"skip_step is {skip_step!r}, it must be True or False")
        super().__init__(masks, update_every, stop_at, min_fan_in, process_group)
        if stop_at <= update_every:
            warn(
                f"stop_at is {stop_at} and update_every is {update_every} steps: the masks will never change"
            )
        if skip_step and update_every == 1:
            warn(
                "update_every is 1 and skip_step is True: until stop_at, every step updates the masks and no "
                "weight, so nothing is trained. Update less often, or pass skip_step=False"
            )
        self.drop_fraction = float(drop_fraction)
        self.drop_schedule = drop_schedule
        self.skip_step = skip_step
        self._concentrated: set[str] = set()  # of these layers there was a warning

    def _prepare(self, step: int) -> Callable[[], list[LayerUpdate]] | None:
        updates = self._begin()
        if not updates.rank(self._rankings(updates)):
            return None  # a gradient is not finite
        self._look_at_ranks(updates)
        ks = self._numbers_to_drop(updates, self._drop_fraction_at(step))
        return lambda: self._update(updates, ks)

    def _update(self, updates: Updates, ks: list[int]) -> list[LayerUpdate]:
        layers = self._grow(updates, ks)
        pairs = zip(self.masks, updates.active, strict=True)
        # Of frozen layers alone nothing is updated, and no step is worth leaving out.
        if self.skip_step and any(self._can_change(parameter, active) for parameter, active in pairs):
            self._skipped_step = SkippedStep(self.masks)
        return layers

    def _look_at_update(self) -> None:
        """Warn, once for each layer, if one neuron got much of what grew."""
        found = [
            name
            for (name, update), parameter in zip(self._last_update.items(), self.masks, strict=True)
            if name not in self._concentrated
            and _is_concentrated(update, neurons_in(self.masks, parameter).count(parameter.shape))
        ]
        self._concentrated.update(found)
        if found:
            name, update = found[0], self._last_update[found[0]]
            more = f" (and likewise in {len(found) - 1} more layers)" if len(found) > 1 else ""
            warn(
                f"one neuron of {name!r} got {update.most_grown} of the {update.grown} weights that "
                f"grew{more}. Behind a normalisation layer, a neuron with few inputs or none may have a "
                "gradient many times the others'. Clip gradients, unless you do: "
                "SparseOpt(max_grad_norm=1). Or update less often (update_every), or drop less "
                "(drop_fraction)"
            )

    def _drop_fraction_at(self, step: int) -> float:
        factor = self.drop_schedule(step, self.stop_at)
        if not (isinstance(factor, Real) and 0.0 <= factor <= 1.0):
            raise ValueError(
                f"drop_schedule returned {factor!r} at step {step}, it must be a number in [0, 1]"
            )
        return self.drop_fraction * float(factor)

    def _numbers_to_drop(self, updates: Updates, fraction: float) -> list[int]:
        """Return how many weights each layer drops: at least what its neurons lack; 0 where none can grow."""
        return [
            max(int(fraction * count), missing) if self._can_change(parameter, count) else 0
            for parameter, count, missing in zip(self.masks, updates.active, updates.missing, strict=True)
        ]

    def _look_at_ranks(self, updates: Updates) -> None:
        """Warn if there is something wrong with that by which weights grow."""

    def _rankings(self, updates: Updates) -> list[Ranking]:
        """The gradients that must be finite, and how many weights may grow by them."""
        gradients = [parameter.grad for parameter in self.masks]
        return [Ranking(layer, g, at_most=0) for layer, g in enumerate(gradients) if g is not None]

    def _can_change(self, parameter: Parameter, active: int) -> bool:
        return active < parameter.numel() and self._can_grow(parameter)

    def _can_grow(self, parameter: Parameter) -> bool:
        raise NotImplementedError

    def _grow(self, updates: Updates, ks: list[int]) -> list[LayerUpdate]:
        raise NotImplementedError


class SET(_DropAndGrow):
    """Sparse evolutionary training (Mocanu et al. 2018): drop by magnitude, grow at random.

    ``loss.backward(); dst.step(); opt.step()``: call it once per optimizer step. Step ``t`` (1 for the
    first call) updates the masks when ``t`` is a multiple of ``update_every`` and ``t < stop_at``. In
    each layer the ``int(f(t) * nnz)`` active weights of smallest magnitude are dropped, with
    ``f(t) = drop_fraction * drop_schedule(t, stop_at)``, and as many are grown, uniformly at random among
    all those not kept. So ``nnz`` of a layer never changes. A weight that was just dropped may grow
    again, and then keeps its value; one that becomes active starts at 0.

    The masks are written in place, and weights that left the mask or are new in it are zeroed. ``SparseOpt``
    sees the write in its next step, and zeroes the momentum of what was dropped.

    With ``skip_step``, the optimizer's step that follows an update only applies the masks: weights and
    momentum outside of them are zeroed, and no parameter of that optimizer is moved. The gradient of that
    step has chosen the masks (RigL), and is not used twice. ``SparseOpt`` sees to that if its ``masks`` have
    one of these masks. For other optimizers there is :attr:`skip_next`. An update that AMP's overflow
    postpones skips no step, nor does a mask that the user changes.

    On a CPU, with the native library, an update takes a few passes over memory. Elsewhere PyTorch does it,
    with the same results.

    A non-finite gradient on a masked parameter (the overflow of a loss scale) postpones the update to
    the next step whose gradients are finite: nothing is dropped, grown or drawn. A parameter that does
    not require a gradient keeps its mask. No other use is made of gradients.

    The random choices depend on (``seed``, layer, step) alone, and are drawn on the CPU: they are the
    same on every device, on every rank of a distributed run, and after a resume.

    In a distributed run, call ``step()`` on every rank. Where an update is due, made or postponed, and in the
    first step, the ranks compare their masks, settings and clocks, and every rank raises if they differ.

    With ``min_fan_in``, no neuron falls below that many inputs: its largest weights are not dropped, so that
    a layer may drop fewer than ``int(f(t) * nnz)``. A neuron that has fewer inputs to begin with gets what it
    lacks before anything else grows, at random among its own inputs. At least as many weights are dropped.

    Args:
        masks: masks (True = active) by parameter, a :class:`Masks` or a dict. Boolean, or floating-point
            numbers that are 0 or 1, which they stay.
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
        skip_step: whether the step that follows an update is left out. The published codes differ: RigL's
            (google-research/rigl) and those of SET and RigL in jaxpruner leave it out; SET as of 2018, which
            updates its masks after each epoch, does not.
        min_fan_in: how many inputs every neuron keeps; 0 is as published.
        process_group: the ranks of a distributed run that have the same masks. ``"world"`` is all of them.
            None compares nothing: for ensembles whose members differ. It is not part of ``state_dict()``.

    Raises:
        ValueError: an argument is out of range, ``masks`` is empty, a mask does not fit its parameter, or a
            layer has fewer active weights than ``min_fan_in`` for each of its neurons. From ``step()``,
            before anything is written: ``drop_schedule`` did not return a number in [0, 1], or masks have
            changed and have too few active weights by now.
        TypeError: ``drop_schedule`` cannot be called, or a key of ``masks`` is not a parameter.
        RuntimeError: from ``step()``, after an update was made or postponed: the ranks do not agree.

    Warns:
        UserWarning: the masks will never change; nothing would be trained (``update_every=1`` with
            ``skip_step``); in the first step, they have other values than when this object was made (the
            model's checkpoint was loaded, and that of this object was not); or, once for each layer, one
            neuron of it got more than a third of what grew.
    """

    _settings = (*_DropAndGrow._settings, "seed")

    def __init__(
        self,
        masks: Mapping[Parameter, Tensor],
        drop_fraction: float = 0.3,
        update_every: int = 100,
        *,
        stop_at: float,
        drop_schedule: DropSchedule = cosine,
        seed: int = 0,
        skip_step: bool = True,
        min_fan_in: int = 0,
        process_group: Group = "world",
    ) -> None:
        super().__init__(
            masks, drop_fraction, update_every, stop_at, drop_schedule, skip_step, min_fan_in, process_group
        )
        self.seed = int(seed)

    def _can_grow(self, parameter: Parameter) -> bool:
        # What grows in a frozen parameter would stay 0.
        return parameter.requires_grad

    def _grow(self, updates: Updates, ks: list[int]) -> list[LayerUpdate]:
        return updates.grow_random(ks, [generator(self.seed, layer, self._step) for layer in range(len(ks))])


class RigL(_DropAndGrow):
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

    It needs the gradients of all weights. If they were multiplied by the masks, there is nothing to rank by:
    ``step()`` warns once, and a layer of ``torch.nn.utils.prune`` is an error when ``RigL`` is made.

    Args:
        masks, drop_fraction, update_every, stop_at, drop_schedule, skip_step, process_group: as in
            :class:`SET`.
        min_fan_in: as in :class:`SET`; a neuron gets what it lacks by ``|p.grad|`` among its own inputs.
        regrow: ``"original"`` ranks by ``|p.grad|``, which the paper found better; ``"corrected"`` by
            ``c_i * |p.grad|`` with ``c_i = sqrt(fan_in_i / mean fan-in)`` of the mask before the update,
            the gradient that SparseOpt applies (Section 5.2, Figures 5 and 10). There, a neuron without
            active weights has ``c_i = 0`` and so grows last.

    Raises:
        ValueError: as in :class:`SET`; or ``regrow`` is unknown, or a layer was pruned by
            ``torch.nn.utils.prune``.
        TypeError: as in :class:`SET`.
        RuntimeError: as in :class:`SET`; or, from ``step()``, an update is due and no masked parameter has a
            gradient.
    """

    _settings = (*_DropAndGrow._settings, "regrow")

    def __init__(
        self,
        masks: Mapping[Parameter, Tensor],
        drop_fraction: float = 0.3,
        update_every: int = 100,
        *,
        stop_at: float,
        drop_schedule: DropSchedule = cosine,
        regrow: Literal["original", "corrected"] = "original",
        skip_step: bool = True,
        min_fan_in: int = 0,
        process_group: Group = "world",
    ) -> None:
        if regrow not in ("original", "corrected"):
            raise ValueError(f"regrow is {regrow!r}, it must be 'original' or 'corrected'")
        super().__init__(
            masks, drop_fraction, update_every, stop_at, drop_schedule, skip_step, min_fan_in, process_group
        )
        self.regrow = regrow
        self._has_warned = False
        for name in self._names:
            if name.endswith("_orig"):
                raise ValueError(_PRUNED_BY_PYTORCH.format(name=name, own=name.rpartition(".")[2][:-5]))

    def _rankings(self, updates: Updates) -> list[Ranking]:
        at_most = self._numbers_to_drop(updates, self.drop_fraction)
        rankings = [
            ranking._replace(at_most=at_most[ranking.layer]) for ranking in super()._rankings(updates)
        ]
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
        return mask_factors(as_boolean(mask), neurons_in(self.masks, parameter))

    def _look_at_ranks(self, updates: Updates) -> None:
        if not self._has_warned and updates.ranks_are_masked():
            self._has_warned = True
            warn(
                "gradients are masked: they are 0 for all inactive weights of all layers, though not for "
                "active ones. RigL needs dense gradients, or it grows whichever weights come first. Do not "
                "multiply gradients by the masks before dst.step(), nor weights in the forward pass (as "
                "torch.nn.utils.prune does): SparseOpt keeps inactive weights at 0 without that"
            )

    def _can_grow(self, parameter: Parameter) -> bool:
        return parameter.grad is not None

    def _grow(self, updates: Updates, ks: list[int]) -> list[LayerUpdate]:
        return updates.grow_largest(ks)
