"""``UpdateWarnings``: decides which warnings an update of the masks deserves. Their texts are in
``method_notices.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..user_warning import warn
from . import method_notices
from .turns import warn_of_turns

if TYPE_CHECKING:
    from .dynamic_sparse_training import DynamicSparseTraining
    from .update_plan import UpdatePlan


_MANY = 20  # a GradScaler's first steps overflow, one after the other, until its scale is small enough


class UpdateWarnings:
    """The warnings that any method gives, each once, and what has to be remembered for them."""

    def __init__(self) -> None:
        self._steps = 0
        self._looks_left = 2  # at weights outside the masks: a pass over all weights
        self._postponed = 0  # steps, since the last update
        self._without_gradients = 0  # updates in a row
        self._in_a_row = 0  # the updates of the last steps, each of which left out a step
        self._has_warned_of_no_step = self._has_warned_of_gradients = False

    def of_settings(self, method: DynamicSparseTraining) -> None:
        """Warn of settings that leave out every step."""
        if method.skip_step and method.update_every == 1:
            self._has_warned_of_no_step = True
            warn(method_notices.NOTICE_OF_NO_STEP)

    def count(self, *, skips: bool) -> None:
        """Count a step. ``skips``: the one before was an update that leaves out a step."""
        self._steps += 1
        self._in_a_row = self._in_a_row + 1 if skips else 0

    def of_postponed(self, method: DynamicSparseTraining) -> None:
        """Warn of an update that was postponed in many steps. To be called in each of them."""
        self._postponed += 1
        if self._postponed == _MANY:
            warn(method_notices.notice_of_postponed_update(type(method).__name__, _MANY))

    def before_update(self, method: DynamicSparseTraining, plan: UpdatePlan) -> None:
        """Warn of gradients that are missing or were multiplied by the masks, and of weights trained without
        masks."""
        self._postponed = 0
        self._without_gradients = self._without_gradients + 1 if plan.has_no_gradients() else 0
        if self._without_gradients == 2:
            warn(method_notices.notice_of_no_gradients(type(method).__name__))
        self._of_gradients(method, method_notices.notice_of_masked_gradients, plan.gradients_are_masked)
        if self._steps > 1 and self._looks_left:  # the first step may be what applies the masks
            self._looks_left -= 1
            if (told := plan.told_if_dense()) is not None:
                self._looks_left = 0
                warn(method_notices.notice_of_dense_weights(told))

    def of_update(self, method: DynamicSparseTraining, plan: UpdatePlan) -> None:
        """Warn of an update that was carried out."""
        if method.skip_next and self._in_a_row == 2 and not self._has_warned_of_no_step:
            self._has_warned_of_no_step = True
            warn(method_notices.NOTICE_OF_UPDATES_IN_A_ROW)
        if plan.is_asked_for and not method.updated:
            self._of_gradients(method, method_notices.notice_of_zero_gradients, plan.gradients_are_zero)
        layers = zip(method.last_update.items(), method.masks, strict=True)
        warn_of_turns(method, [(name, parameter) for (name, update), parameter in layers if update.grown])

    def _of_gradients(
        self, method: DynamicSparseTraining, notice: Callable[[str], str], are_wrong: Callable[[], bool]
    ) -> None:
        if method.uses_gradients and not self._has_warned_of_gradients and are_wrong():
            self._has_warned_of_gradients = True
            warn(notice(type(method).__name__))
