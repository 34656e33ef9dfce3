"""``DynamicSparseTraining``: the base class of all methods that change masks during training.

Here are its hooks, its clock and its state. How the answers of the hooks become new masks is in
``update_plan.py``. Nothing here knows the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from ..masks.mapping import Masks, active_weights
from ..masks.registered_masks import remember, remembered_places
from ..sharding import is_sharded, shards_in
from ..skipped_steps import SkippedStep
from ..user_warning import warn
from . import method_arguments, method_notices, topology_table
from .agreement import Group, check_masks_agree, on_all_or_none
from .explored import Explored, rate_of
from .hooks import Counts, Layer, Magnitude, Score
from .layer_update import LayerUpdate
from .update_plan import UpdatePlan
from .update_warnings import UpdateWarnings


class DynamicSparseTraining:
    """The base class of methods that change masks during training: SET, RigL, GMP, and your own.

    A method says by its hooks what is particular to it: :meth:`counts` (how many weights each layer drops and
    grows), :meth:`drop_score` and :meth:`grow_score` (which ones), :meth:`can_change` (in which layers) and
    :meth:`next_update` (when). Only :meth:`counts` has no default. The page on adding a method has examples.

    An update calls ``can_change`` and ``grow_score`` for each layer; then, if all gradients are finite,
    ``counts`` once, and ``drop_score`` for each layer that drops weights; all under ``torch.no_grad()``.
    Hooks may read the tensors of the layers, and must not write to them. On all ranks they must answer alike.
    The base class does the rest:

    - Of the active weights those of smallest drop score are dropped, and then those of largest grow score
      grow among all that are not kept: as many as ``counts`` says, exactly. A weight that was just dropped
      may grow again, and then keeps its value; one that becomes active starts at 0.
    - Of equal scores, an active weight comes before an inactive one, and then the lower index (row-major): it
      is kept, or grown, first. A NaN among the weights drops first; NaN in a tensor of scores is an error.
    - Random growth depends on (``seed``, layer, step) alone: it is the same on every device and rank.
    - Masks and weights are written in place after all answers were checked. An error of a hook names the
      method, the hook and the layer, and leaves the masks, the weights and the clock as they were.
    - A non-finite gradient of a masked parameter postpones the update to the next step whose gradients are
      finite, unless :attr:`postpones` is False.

    Args:
        masks: masks (True = active) by parameter, a :class:`Masks` or a dict. Boolean, or floating-point
            numbers that are 0 or 1, which they stay.
        update_every: steps between updates.
        start_at: the step that updates are counted from: they are made in the steps ``start_at +
            update_every``, ``start_at + 2 * update_every`` and so on.
        stop_at: the step from which on the masks stay as they are; ``math.inf`` for no end.
        seed: of the random choices.
        skip_step: whether the optimizer's step that follows an update is left out: see :class:`SET`.
        min_fan_in: the number of inputs that every neuron keeps; see :class:`SET`.
        process_group: the ranks of a distributed run that have the same masks: see :class:`SET`.

    Raises:
        ValueError: an argument is out of range, ``masks`` is empty, or a mask does not fit its parameter; or,
            from ``step()``, a hook returned wrong counts or scores.
        TypeError: a key of ``masks`` is not a parameter, or ``skip_step`` is not a bool; from ``step()``: a
            hook returned something else than it must.
        RuntimeError: from ``step()``: a hook has written to a tensor, or the ranks do not agree.

    Warns:
        UserWarning: as :class:`SET`, but for its last two.
    """

    settings: ClassVar[tuple[str, ...]]
    """The names of the attributes that ``state_dict`` saves and that must be equal on all ranks. A subclass
    adds its own: ``settings = (*DynamicSparseTraining.settings, "fan_in")``."""
    settings = ("skip_step", "update_every", "start_at", "stop_at", "min_fan_in", "seed")
    shown: ClassVar[tuple[str, ...]] = ("update_every", "stop_at")
    """The names of the attributes that ``repr`` shows first."""
    postpones: ClassVar[bool] = True
    """True if a non-finite gradient postpones an update."""
    uses_gradients: ClassVar[bool] = False
    """True if weights grow by gradients. Then a layer without a gradient keeps its mask, an update without
    any gradient is an error, and gradients that were multiplied by the masks are warned of."""

    _usual: ClassVar[dict[str, Any]] = {"min_fan_in": 0, "skip_step": True}  # these are not shown
    _formerly: ClassVar[dict[str, Any]] = {"min_fan_in": 0, "skip_step": False}  # of states without them
    _skipped_step: SkippedStep | None = None
    _uncompiled_step: Callable[[], None]

    def __init__(
        self,
        masks: Mapping[Parameter, Tensor],
        update_every: int = 100,
        *,
        stop_at: float,
        start_at: int = 0,
        seed: int = 0,
        skip_step: bool = True,
        min_fan_in: int = 0,
        process_group: Group = "world",
    ) -> None:
        method_arguments.check_steps(update_every, start_at, stop_at)
        method_arguments.check_options(skip_step, min_fan_in, seed)
        method_arguments.check_process_group(process_group)
        self._names = method_arguments.check_masks(masks)
        self.masks = masks
        self.update_every = int(update_every)
        self.start_at = int(start_at)
        self.stop_at = float(stop_at)
        self.seed = int(seed)
        self.skip_step = skip_step
        self.min_fan_in = int(min_fan_in)
        self.process_group = process_group
        self._step = 0
        self._due = self._updated = False
        self._explored = Explored(masks)
        self._last_update: dict[str, LayerUpdate] = {}
        self._is_compared = False
        self._is_new = True
        self._warnings = UpdateWarnings(type(self).__name__)
        self._leave_out_of_graphs()
        method_arguments.check_min_fan_in(min_fan_in, masks, self._names, active_weights(masks))
        if self.uses_gradients:
            method_arguments.check_not_pruned(type(self).__name__, self._names)
        if type(self).next_update is DynamicSparseTraining.next_update and self.next_update(0) is None:
            warn(method_notices.notice_of_no_update(update_every, stop_at))
        self._warnings.of_settings(self)

    def counts(self, layers: Sequence[Layer], step: int) -> Sequence[Counts]:
        """Return how many weights each layer drops and grows in the update of that step: a hook.

        It is called once per update, after the gradients were found to be finite, and is given all layers at
        once, so that it may choose across them.

        Args:
            layers: those that :meth:`can_change`, in the order of the masks.
            step: the number of the step, 1 for the first call of :meth:`step`.

        Returns:
            One ``Counts`` for each of these layers. ``drop`` is at most ``layer.active``, ``grow`` at
            most the number of weights that are not kept. They need not be equal. With two integers, weights
            are chosen among all of the layer; with two int64 tensors of shape ``(neurons,)`` on the weight's
            device, among those of each neuron. With ``min_fan_in`` and integers, weights that neurons need
            are not dropped, and as many fewer are dropped and grown; ``grow`` is 0, or at least
            ``layer.missing``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define counts(layers, step)")

    def drop_score(self, layer: Layer) -> Score:
        """Return a score for each weight: the active ones of smallest score are dropped. A hook.

        It is called once per update for each layer that drops weights, after :meth:`counts`.

        Returns:
            A tensor of real numbers of the weight's shape and device, without NaN (any real dtype; it may be
            negative or infinite), or a ``Magnitude``. The default is ``Magnitude(layer.weight)``.
        """
        return Magnitude(layer.weight)

    def grow_score(self, layer: Layer) -> Score | None:
        """Return a score for each weight: those of largest score grow, among all that are not kept. A hook.

        It is called once per layer when an update is due, before it is known whether all gradients are
        finite: if one is not, its scores are thrown away. So it should compute from the layer alone, and keep
        nothing.

        Returns:
            As of :meth:`drop_score`; or None, the default, for growth uniformly at random.
        """
        return None

    def can_change(self, layer: Layer) -> bool:
        """Return whether the mask of the layer may change in this update: a hook.

        It is called once per layer when an update is due. No other hook is called for layers that may not. By
        default, all layers can change that require a gradient, and have one if :attr:`uses_gradients`.
        """
        has_what_it_needs = layer.gradient is not None or not self.uses_gradients
        return layer.parameter.requires_grad and has_what_it_needs

    def next_update(self, step: int) -> int | None:
        """Return the first step after ``step`` in which an update is due, None without one: a hook.

        It is called in every step, must be quick, and must depend on ``step`` and settings alone. By default,
        it goes by ``update_every``, ``start_at`` and ``stop_at``.
        """
        passed = max(0, step - self.start_at) // self.update_every
        due = self.start_at + (passed + 1) * self.update_every
        return due if due < self.stop_at else None

    def _most_that_grow(self, layer: Layer) -> int:
        """Return how many weights may grow in the layer at most; if it is not 0, one pass over the gradient
        ranks by it and finds it finite."""
        return 0

    def _check_last_update(self) -> None:
        """Warn if there is something wrong with the last update."""

    @property
    def updated(self) -> bool:
        """True if the last call of :meth:`step` changed a mask.

        False when no update was due, when it was postponed, when every dropped weight grew again, and
        before the first call, also of a resumed run.
        """
        return self._updated

    @property
    def last_update(self) -> dict[str, LayerUpdate]:
        """The numbers of the last update, by the name of the layer.

        They count weights that were dropped and grown, neurons that died and that were revived, and the share
        of the growth that one neuron got. There are none before the first update, also of a resumed run.
        """
        return dict(self._last_update)

    @property
    def skip_next(self) -> bool:
        """True from an update of the masks until the next call of :meth:`step`.

        The optimizer's step between the two is to be left out. ``SparseOpt`` sees to that by itself. With
        another optimizer, apply the masks to weights and momentum then, and do not call its ``step``. It is
        always False with ``skip_step=False``, and of :class:`GMP`.
        """
        return self._skipped_step is not None

    def step(self) -> None:
        """Count one training step, and update the masks if an update is due.

        Call it once per optimizer step: ``loss.backward(); dst.step(); opt.step()``. :attr:`updated` tells if
        a mask has changed; call the optimizer's step in either case.
        """
        if torch.compiler.is_compiling():
            self._uncompiled_step()
        else:
            self._count_step()

    @torch.no_grad()
    def _count_step(self) -> None:
        self._warnings.count(skips=self.skip_next)
        self._end_update()
        if self._is_new and self._explored.differs_from_masks():
            warn(method_notices.notice_of_loaded_masks(type(self).__name__))
        self._is_new = False
        step = self._step + 1
        due = step == self._next_due()
        if not self._is_compared and any(map(is_sharded, self.masks)):
            self._compare_ranks()  # with other clocks, they would wait in an update
        try:
            plan = self._plan(step) if due else None
        except Exception as error:
            if not any(map(is_sharded, self.masks)):  # ranks of sharded masks wait elsewhere
                with suppress(RuntimeError):  # the other ranks would wait for this one where they compare
                    self._compare_ranks(str(error))
            raise
        self._step = step
        self._due = due and plan is None
        if plan is not None:
            self._carry_out(plan)
        if due or not self._is_compared:
            self._compare_ranks()
        if plan is not None:  # last: a warning may be an error
            self._warnings.of_update(self, plan)
            self._check_last_update()
        elif due:
            self._warnings.of_postponed()

    def _end_update(self) -> None:
        self._updated = False
        if self._skipped_step is not None:
            self._skipped_step.withdraw()
            self._skipped_step = None

    def _next_due(self) -> int | None:
        """Return the step of the next update, also of a postponed one."""
        if not self._due:
            return self.next_update(self._step)
        return self._step + 1 if self._step + 1 < self.stop_at else None

    def _plan(self, step: int) -> UpdatePlan | None:
        """Return the update of that step; None if it is postponed. Nothing is written yet."""
        shards = shards_in([{"params": self.masks}])
        with on_all_or_none(shards):
            method_arguments.check_present_masks(self.masks, self._names)
        plan = UpdatePlan(self, self._names, self._explored.unions(), shards)
        method_arguments.check_min_fan_in(self.min_fan_in, self.masks, self._names, plan.active)
        if not plan.ask_grow_scores():
            return None
        self._warnings.look(self, plan)
        plan.ask_counts(step)
        return plan

    def _carry_out(self, plan: UpdatePlan) -> None:
        self._last_update = dict(zip(self._names, plan.carry_out(), strict=True))
        self._updated = any(layer.changed for layer in self._last_update.values())
        if plan.is_asked_for and self.skip_step:  # an update that was asked for nothing is not worth a step
            self._skipped_step = SkippedStep(self.masks)

    def _check_settings(self) -> None:
        """Raise ``TypeError`` or ``ValueError`` unless the settings are valid, which anybody may have set."""
        method_arguments.check_steps(self.update_every, self.start_at, self.stop_at)
        method_arguments.check_options(self.skip_step, self.min_fan_in, self.seed)

    def _compare_ranks(self, failure: str = "none") -> None:
        """Raise ``RuntimeError`` if the ranks do not agree.

        The first step asks, too: later, ranks whose clocks differ would wait for each other in vain.
        ``failure`` is the error that has kept this rank from an update.
        """
        clock = {name: getattr(self, name) for name in self.settings}
        clock = {"the error": failure, "step": self._step, "a postponed update": self._due, **clock}
        check_masks_agree(clock, dict(zip(self._names, self.masks.values(), strict=True)), self.process_group)
        self._is_compared = True

    @classmethod
    def _leave_out_of_graphs(cls) -> None:
        """Let ``torch.compile`` break its graph at a step. It imports the compiler: a class is too early."""
        if not hasattr(cls, "_uncompiled_step"):
            cls._uncompiled_step = torch.compiler.disable(cls._count_step)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        # Of masks in a dict, a copy must know the layers that they are registered in. Masks knows by itself.
        places = [] if isinstance(self.masks, Masks) else remembered_places(self.masks)
        return {**self.__dict__, "_places": places, "_skipped_step": None, "_warnings": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._warnings = UpdateWarnings(type(self).__name__)
        remember(self.__dict__.pop("_places"))
        self._leave_out_of_graphs()

    @torch.no_grad()
    def exploration_rate(self) -> float:
        """Return R_m, the in-time over-parameterisation rate of Liu et al. (2021), in [0, 1]: the number of
        weights that have been active at some time (in the initial masks, in any since, or now), divided by
        the number of elements of the masked parameters."""
        return rate_of(self._explored.with_masks())

    @torch.no_grad()
    def exploration_rates(self) -> dict[str, float]:
        """Return R_m of each layer, by the name of its parameter (``"parameter 0"`` and so on, if the masks
        are a dict)."""
        explored = zip(self._names, self._explored.with_masks(), strict=True)
        return {name: rate_of([union]) for name, union in explored}

    def summary(self) -> list[topology_table.TopologySummary]:
        """Return one record for each layer, of now and of the last update. ``print(dst)`` shows a table."""
        return topology_table.summary(self)

    def __str__(self) -> str:
        return f"{self!r}\n{topology_table.table(self)}"

    def __repr__(self) -> str:
        due = self._next_due()
        told = {name: getattr(self, name) for name in self.shown}
        told |= {"step": self._step, "next_update": "none" if due is None else due}
        own = {name: getattr(self, name) for name in self._usual if name in self.settings}
        told |= {name: value for name, value in own.items() if value != self._usual[name]}
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in told.items())})"

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs beside the state of the model, which has the masks, and of the
        optimizer.

        These are the settings, the number of steps, whether a postponed update is due, and the weights that
        have been active so far: a list of boolean tensors in the order of ``masks``. It can be loaded by
        ``torch.load(weights_only=True)``. ``drop_schedule`` and ``process_group`` are not part of it: give
        the resumed run the same ones.
        """
        state = {"step": self._step, "due": self._due, "explored": self._explored.with_masks()}
        return {name: getattr(self, name) for name in self.settings} | state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state: the run goes on where the saved one was, bit for bit the same.

        That holds if it was not saved between an update and the optimizer's step that it leaves out: the
        resumed run makes that step. The settings are replaced by the saved ones, as in PyTorch's optimizers
        and schedulers. The masks come with the model's ``state_dict`` (or are the caller's to restore).

        Raises:
            TypeError, ValueError: ``state_dict`` is another class's, or of masks of other shapes, or a
                setting is not valid. Nothing has been changed then.
        """
        former = {name: getattr(self, name) for name in self.settings}
        state = method_arguments.checked_state(state_dict, former, self._formerly)
        self.__dict__.update({name: state[name] for name in self.settings})
        try:
            self._check_settings()
            self._explored.load(state["explored"])
        except Exception:
            self.__dict__.update(former)
            raise
        self._step, self._due = state["step"], state["due"]
        self._end_update()
        self._last_update = {}
        self._is_compared = self._is_new = False
