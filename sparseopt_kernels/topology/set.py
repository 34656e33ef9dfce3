"""SET: drops by magnitude, and grows as many weights at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import ClassVar

from torch import Tensor
from torch.nn.parameter import Parameter

from ..known_optimizers import is_norm_limited
from ..masks.mapping import neurons_in
from ..user_warning import warn
from .agreement import Group
from .drop_schedules import DropSchedule, cosine
from .dynamic_sparse_training import DynamicSparseTraining
from .hooks import Counts, Layer
from .method_arguments import check_fraction
from .method_notices import is_concentrated, notice_of_concentrated_growth


class SET(DynamicSparseTraining):
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
    one of these masks. For other optimizers there is :attr:`~DynamicSparseTraining.skip_next`. An update that
    AMP's overflow postpones skips no step, nor does a mask that the user changes.

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
            ``skip_step``), or three steps in a row were left out; in the first step, the masks have other
            values than when this object was made (the model's checkpoint was loaded, and that of this object
            was not); an update is postponed for 20 steps; between updates, nothing changes the weights of a
            layer that requires a gradient; most weights outside a mask are not 0; another method grows
            weights in the same masks in turns; or, once for each layer, one neuron of it got more than a
            third of what grew.
    """

    # Annotated, so that subclasses may have more of them.
    settings: ClassVar[tuple[str, ...]]
    settings = ("drop_fraction", "skip_step", "update_every", "stop_at", "min_fan_in", "seed")
    shown: ClassVar[tuple[str, ...]] = ("drop_fraction", *DynamicSparseTraining.shown)

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
        check_fraction("drop_fraction", drop_fraction)
        if not callable(drop_schedule):
            raise TypeError(f"drop_schedule is {drop_schedule!r}, it must be a function of (step, stop_at)")
        super().__init__(
            masks,
            update_every,
            stop_at=stop_at,
            seed=seed,
            skip_step=skip_step,
            min_fan_in=min_fan_in,
            process_group=process_group,
        )
        self.drop_fraction = float(drop_fraction)
        self.drop_schedule = drop_schedule
        self._concentrated: set[str] = set()  # of these layers there was a warning

    def can_change(self, layer: Layer) -> bool:
        """Return whether the layer has inactive weights, and requires a gradient: what grows in a frozen one
        would stay 0."""
        return layer.active < layer.numel and super().can_change(layer)

    def counts(self, layers: Sequence[Layer], step: int) -> list[Counts]:
        """Return ``int(f(step) * nnz)`` for each layer, twice, but no less than its neurons lack."""
        fraction = self.drop_fraction_at(step)
        ks = [max(int(fraction * layer.active), layer.missing) for layer in layers]
        return [Counts(drop=k, grow=k) for k in ks]

    def drop_fraction_at(self, step: int) -> float:
        """Return ``drop_fraction * drop_schedule(step, stop_at)``.

        Raises:
            ValueError: ``drop_schedule`` did not return a number in [0, 1].
        """
        factor = self.drop_schedule(step, self.stop_at)
        if not (isinstance(factor, Real) and 0.0 <= factor <= 1.0):
            raise ValueError(
                f"drop_schedule returned {factor!r} at step {step}, it must be a number in [0, 1]"
            )
        return self.drop_fraction * float(factor)

    def _check_settings(self) -> None:
        super()._check_settings()
        check_fraction("drop_fraction", self.drop_fraction)

    def _most_that_grow(self, layer: Layer) -> int:
        return max(int(self.drop_fraction * layer.active), layer.missing)

    def _check_last_update(self) -> None:
        """Warn, once for each layer, if one neuron got much of what grew."""
        found = {
            name: parameter
            for (name, update), parameter in zip(self._last_update.items(), self.masks, strict=True)
            if name not in self._concentrated
            and is_concentrated(update, neurons_in(self.masks, parameter).count(parameter.shape))
        }
        self._concentrated.update(found)
        if found:
            name, is_limited = next(iter(found)), is_norm_limited(found.values())
            update, others = self._last_update[name], len(found) - 1
            warn(notice_of_concentrated_growth(name, update, others, is_limited=is_limited))
