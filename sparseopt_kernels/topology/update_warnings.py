"""``UpdateWarnings``: decides which warnings an update of the masks deserves. Their texts are in
``method_notices.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..user_warning import warn
from . import method_notices
from .turns import Turns
from .untrained_layers import UntrainedLayers

if TYPE_CHECKING:
    from .dynamic_sparse_training import DynamicSparseTraining
    from .update_plan import UpdatePlan

_MANY = 20  # a GradScaler's first steps overflow, one after the other, until its scale is small enough


class UpdateWarnings:
    """The warnings that any method gives, and what has to be remembered for them.

    A warning comes once; that an update is postponed for long, once for each such update. Copies of a method
    begin anew.

    Args:
        name: of the method's class.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._turns = Turns(name)
        self._steps = self._updates = 0
        self._postponed = 0  # steps, since the last update
        self._in_a_row = 0  # the updates of the last steps, each of which left out a step
        self._untrained = UntrainedLayers()
        self._found: dict[str, str] = {}  # what is wrong with the present update: kinds and texts of warnings
        self._told: set[str] = set()  # the kinds of warnings that were given

    def of_settings(self, method: DynamicSparseTraining) -> None:
        """Warn of settings that leave out every step."""
        if method.skip_step and method.update_every == 1:
            self._warn("no step", method_notices.NOTICE_OF_NO_STEP)

    def count(self, *, skips: bool) -> None:
        """Count a step. ``skips``: the one before was an update that leaves out a step."""
        self._steps += 1
        self._in_a_row = self._in_a_row + 1 if skips else 0

    def of_postponed(self) -> None:
        """Warn of an update that was postponed in many steps. To be called in each of them."""
        self._postponed += 1
        if self._postponed == _MANY:
            warn(method_notices.notice_of_postponed_update(self._name, _MANY))

    def look(self, method: DynamicSparseTraining, plan: UpdatePlan) -> None:
        """Look at gradients and weights before an update. Warnings come after it: they may be errors."""
        self._postponed = 0
        self._found = {}
        if method.uses_gradients and "gradients" not in self._told and plan.gradients_are_masked():
            self._found["gradients"] = method_notices.notice_of_masked_gradients(self._name)
        if self._looks_for_untrained and (names := self._untrained.find(plan.layers)):
            self._found["untrained"] = method_notices.notice_of_untrained(self._name, names)
        if "outside" not in self._told and self._steps > 1:  # the first step may be what applies the masks
            told = plan.told_if_dense(self._updates)
            if told is not None:
                self._found["outside"] = method_notices.notice_of_weights_outside(told)

    def of_update(self, method: DynamicSparseTraining, plan: UpdatePlan) -> None:
        """Warn of an update that was carried out, and of what was seen before it."""
        self._updates += 1
        if self._looks_for_untrained:
            self._untrained.remember(plan.layers)
        if method.skip_next and self._in_a_row == 2:
            self._found["no step"] = method_notices.NOTICE_OF_UPDATES_IN_A_ROW
        if plan.is_asked_for and not method.updated and method.uses_gradients and plan.gradients_are_zero():
            self._found["gradients"] = method_notices.notice_of_zero_gradients(self._name)
        layers = zip(method.last_update.items(), method.masks, strict=True)
        turn = self._turns.add((name, parameter) for (name, update), parameter in layers if update.grown)
        if turn is not None:
            self._found["turns"] = method_notices.notice_of_turns(turn[0], self._name, turn[1])
        for kind, notice in self._found.items():
            self._warn(kind, notice)

    @property
    def _looks_for_untrained(self) -> bool:
        """False once the warning was given, or that of steps left out in a row, which is the reason then."""
        return not {"untrained", "no step"} & self._told

    def _warn(self, kind: str, notice: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            warn(notice)
