"""GradScaler's part of a step: the scale of the gradients, and whether the step is skipped."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Amp(NamedTuple):
    """The scale and the verdict of GradScaler: one-element tensors on any device, or None.

    Gradients are ``grad_scale`` times too large, and hold an infinity or NaN where ``found_inf`` is not 0.
    """

    grad_scale: Tensor | None
    found_inf: Tensor | None
