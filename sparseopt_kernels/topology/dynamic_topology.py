"""When masks change during training, and what is remembered of it: shared by SET, RigL and GMP.

Which weights are chosen is in ``mask_update.py``, and how it is done for all layers in ``updates.py``.
Nothing here knows the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from ..masks.mapping import Masks, neurons_in
from ..masks.registered_masks import as_boolean, check_mask, remember, remembered_places
from ..neurons import Neurons
from ..skipped_steps import SkippedStep
from ..user_warning import warn
from . import topology_table
from .agreement import Group, check_masks_agree
from .layer_update import LayerUpdate
from .masked_layers import check_masks
from .native_updates import NativeUpdates, supports
from .updates import Layer, TorchUpdates, Updates


class DynamicTopology:
    """A clock that counts training steps and lets a subclass update the masks when it is time."""

    _settings: ClassVar[tuple[str, ...]] = ("update_every", "stop_at", "min_fan_in")
    _shown: ClassVar[tuple[str, ...]] = ("update_every", "stop_at")
    _shown_unless: ClassVar[tuple[tuple[str, Any], ...]] = (("min_fan_in", 0),)
    _formerly: ClassVar[dict[str, Any]] = {"min_fan_in": 0}
    _skipped_step: SkippedStep | None = None
    _uncompiled_step: Callable[[], None]

    def __init__(
        self,
        masks: Mapping[Parameter, Tensor],
        update_every: int,
        stop_at: float,
        min_fan_in: int,
        process_group: Group,
    ) -> None:
        if not (update_every >= 1 and update_every == int(update_every)):
            raise ValueError(f"update_every is {update_every}, it must be an integer of at least 1 (steps)")
        if not stop_at > 0.0:
            raise ValueError(f"stop_at is {stop_at}, it must be positive (steps)")
        if isinstance(min_fan_in, bool) or not isinstance(min_fan_in, int) or min_fan_in < 0:
            raise ValueError(f"min_fan_in is {min_fan_in!r}, it must be an integer of at least 0 (inputs)")
        if isinstance(process_group, str) and process_group != "world":
            raise ValueError(
                f"process_group is {process_group!r}, it must be a process group, 'world' or None"
            )
        self._names = check_masks(masks)
        self.masks = masks
        self.update_every = int(update_every)
        self.stop_at = float(stop_at)
        self.min_fan_in = min_fan_in
        self.process_group = process_group
        self._step = 0
        self._due = False
        self._updated = False
        self._explored = [mask != 0 for mask in masks.values()]
        self._last_update: dict[str, LayerUpdate] = {}
        self._is_compared = False
        self._is_new = True
        self._leave_out_of_graphs()
        if min_fan_in:
            self._check_min_fan_in([int(union.count_nonzero()) for union in self._explored])

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
        of the growth that one neuron got.

        It is empty before the first update of this object, also of a resumed run.
        """
        return dict(self._last_update)

    @property
    def skip_next(self) -> bool:
        """True from an update of the masks until the next call of :meth:`step`.

        The optimizer's step between the two is to be left out.
        ``SparseOpt`` sees to that by itself. With another optimizer, apply the masks to weights and momentum
        then, and do not call its ``step``. It is always False with ``skip_step=False``, and of :class:`GMP`.
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
        self._updated, self._skipped_step = False, None
        self._warn_of_loaded_masks()
        step = self._step + 1
        due = self._is_due(step)
        try:
            update = self._prepare(step) if due else None
        except Exception as error:
            # The other ranks go on to where they compare, and would wait there for this one.
            with suppress(RuntimeError):
                self._compare_ranks(str(error))
            raise
        self._step = step
        self._due = due and update is None
        if update is not None:
            self._last_update = dict(zip(self._names, update(), strict=True))
            self._updated = any(layer.changed for layer in self._last_update.values())
            self._look_at_update()
        if due or not self._is_compared:
            self._compare_ranks()

    def _is_due(self, step: int) -> bool:
        return step < self.stop_at and (self._due or step % self.update_every == 0)

    def _next_update(self) -> int | None:
        """The step of the next update, if it is not postponed; None: there is none."""
        step = self._step + 1 if self._due else (self._step // self.update_every + 1) * self.update_every
        return step if step < self.stop_at else None

    def _compare_ranks(self, failure: str = "none") -> None:
        """Raise ``RuntimeError`` if the ranks do not agree.

        The first step asks, too: later, ranks whose clocks differ would wait for each other in vain.

        Args:
            failure: the error that has kept this rank from an update.
        """
        clock = {name: getattr(self, name) for name in self._settings}
        clock = {"the error": failure, "step": self._step, "a postponed update": self._due, **clock}
        masks = dict(zip(self._names, self.masks.values(), strict=True))
        check_masks_agree(clock, masks, self.process_group)
        self._is_compared = True

    def _warn_of_loaded_masks(self) -> None:
        """Warn in the first step if masks were loaded, but the state of this object was forgotten."""
        if not self._is_new:
            return
        self._is_new = False
        pairs = zip(self._explored, self.masks.values(), strict=True)
        if any(not torch.equal(union.to(mask.device), mask != 0) for union, mask in pairs):
            cls = type(self).__name__
            warn(
                f"the masks have changed since {cls} was made, and it is at its first step. If they come "
                f"from a checkpoint of a run that goes on, load the state of {cls} as well "
                "(dst.load_state_dict), or its schedule starts again. If not, "
                f"make {cls} after the masks have got their values"
            )

    @classmethod
    def _leave_out_of_graphs(cls) -> None:
        """Let ``torch.compile`` break its graph once at a step, in which there is nothing for it.

        Not when the class is defined: that would import the compiler.
        """
        if not hasattr(cls, "_uncompiled_step"):
            cls._uncompiled_step = torch.compiler.disable(cls._count_step)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        # Of masks in a dict, a copy must know the layers that they are registered in. Masks knows by itself.
        places = [] if isinstance(self.masks, Masks) else remembered_places(self.masks)
        return {**self.__dict__, "_places": places, "_skipped_step": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        remember(self.__dict__.pop("_places"))
        self._leave_out_of_graphs()

    def _look_at_update(self) -> None:
        """Warn if there is something wrong with the last update."""

    def _prepare(self, step: int) -> Callable[[], list[LayerUpdate]] | None:
        """Return what writes the masks and tells how they changed; None: not in this step.

        Nothing is written before it is called.
        """
        raise NotImplementedError

    def _begin(self) -> Updates:
        """Return an update in which nothing has been written.

        Raises:
            ValueError: the model has replaced a masked parameter, a floating-point mask is none, or too few
                weights are active for ``min_fan_in``.
        """
        if isinstance(self.masks, Masks):
            self.masks.check_held()
        for name, (parameter, mask) in zip(self._names, self.masks.items(), strict=True):
            if mask.dtype != torch.bool:
                check_mask(mask, parameter, name)
        self._explored = [
            union.to(mask.device) for union, mask in zip(self._explored, self.masks.values(), strict=True)
        ]
        pairs = zip(self.masks.items(), self._explored, strict=True)
        layers = [Layer(parameter, mask, union) for (parameter, mask), union in pairs]
        make = NativeUpdates if supports(layers) else TorchUpdates
        updates = make(layers, self._neurons(), self.min_fan_in)
        self._check_min_fan_in(updates.active)
        return updates

    def _neurons(self) -> list[Neurons]:
        return [neurons_in(self.masks, parameter) for parameter in self.masks]

    def _check_min_fan_in(self, active: list[int]) -> None:
        """Raise ``ValueError`` for a layer that has fewer active weights than its neurons need."""
        if not self.min_fan_in:
            return
        pairs = zip(self._names, self.masks, self._neurons(), active, strict=True)
        for name, parameter, neurons, count in pairs:
            number = neurons.count(parameter.shape)
            needed = number * self.min_fan_in if parameter.numel() else 0
            if needed > count:
                raise ValueError(
                    f"min_fan_in is {self.min_fan_in}: {number} neurons of {name!r} need "
                    f"{needed} active weights, it has {count}"
                )

    @torch.no_grad()
    def exploration_rate(self) -> float:
        """Return R_m, the in-time over-parameterisation rate of Liu et al. (2021), in [0, 1].

        It is the number of weights that have been active at some time (in the initial masks, in any since, or
        now), divided by the number of elements of the masked parameters.
        """
        explored = self._explored_so_far()
        return sum(int(union.count_nonzero()) for union in explored) / max(
            1, sum(union.numel() for union in explored)
        )

    @torch.no_grad()
    def exploration_rates(self) -> dict[str, float]:
        """Return R_m of each layer, by the name of its parameter (``"parameter 0"`` and so on, if the masks
        are a dict)."""
        explored = zip(self._names, self._explored_so_far(), strict=True)
        return {name: int(union.count_nonzero()) / max(1, union.numel()) for name, union in explored}

    def summary(self) -> list[topology_table.TopologySummary]:
        """Return one record for each layer: active weights, exploration rate, dead neurons, and what the last
        update did. ``print(dst)`` shows them as a table."""
        return topology_table.summary(self)

    def __str__(self) -> str:
        return f"{self!r}\n{topology_table.table(self)}"

    def __repr__(self) -> str:
        due = self._next_update()
        shown = {name: getattr(self, name) for name in self._shown}
        shown |= {"step": self._step, "next_update": "none" if due is None else due}
        shown |= {
            name: getattr(self, name) for name, usual in self._shown_unless if getattr(self, name) != usual
        }
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in shown.items())})"

    def _explored_so_far(self) -> list[Tensor]:
        # The current mask is there for those who write into their masks themselves.
        pairs = zip(self._explored, self.masks.values(), strict=True)
        return [union.to(mask.device) | as_boolean(mask) for union, mask in pairs]

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs beside the state of the model, which has the masks, and of the
        optimizer.

        These are the settings, the number of steps, whether a postponed update is due, and the weights that
        have been active so far: a list of boolean tensors in the order of ``masks``. It can be loaded by
        ``torch.load(weights_only=True)``. ``drop_schedule`` and ``process_group`` are not part of it: give
        the resumed run the same ones.
        """
        settings = {name: getattr(self, name) for name in self._settings}
        return {**settings, "step": self._step, "due": self._due, "explored": self._explored_so_far()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state: the run goes on where the saved one was, bit for bit the same.

        The settings are replaced by the saved ones, as in PyTorch's optimizers and schedulers. The masks
        themselves come with the model's ``state_dict`` (or are the caller's to restore).

        Raises:
            ValueError: ``state_dict`` is another class's, or of masks of other shapes.
        """
        for name, value in self._formerly.items():
            if name not in state_dict:  # a state from before there was such a setting
                given = getattr(self, name)
                if given != value:
                    warn(f"state_dict has no {name}: it is {value} from here on, and not {given}, as given")
                state_dict = {name: value, **state_dict}
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
        self._updated, self._skipped_step = False, None
        self._last_update = {}
        self._is_compared = False
        self._is_new = False
        pairs = zip(state_dict["explored"], self.masks.values(), strict=True)
        self._explored = [union.clone().to(mask.device) for union, mask in pairs]
