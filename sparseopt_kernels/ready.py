"""The shortest way of a step: on a CPU, as long as nothing changes but numbers, one call of the native
library looks at everything and updates all parameters. What it does not know is left to the long way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn.parameter import Parameter

from . import snapshot
from .kernels.native import NativePlan
from .preparation import Prepared
from .snapshot import Snapshot, State, owners_and_masks

if TYPE_CHECKING:
    from ._native import ReadyStep


class Ready:
    """The step that was made last, which can be made again; ``snapshot`` is what it depends on."""

    __slots__ = ("_step", "snapshot")

    def __init__(self, step: ReadyStep, snapshot: Snapshot) -> None:
        self._step, self.snapshot = step, snapshot

    def make(
        self, groups: list[dict[str, Any]], state: dict[Any, Any], masks: Mapping[Parameter, Tensor]
    ) -> bool:
        """Make the step. False, and nothing has happened, if it is not the same any more."""
        owners, tensors = owners_and_masks(masks)
        return self._step.make(groups, state, owners, tensors, torch.get_num_threads())

    def versions(self) -> list[int]:
        """Of what is watched, after the last step."""
        return self._step.versions()


def ready_again(
    prepared: Prepared,
    made: Snapshot,
    groups: list[dict[str, Any]],
    state: State,
    masks: Mapping[Parameter, Tensor],
) -> Ready | None:
    """What was prepared and made just now, to be made again. None where it takes more than the native
    library, or must be prepared anew.

    Args:
        prepared, made: the step, and what it depends on.
        groups, state, masks: the optimizer's.
    """
    if snapshot.READER is None or len(prepared.batches) != 1 or prepared.new_buffers:
        return None
    batch = prepared.batches[0]
    if not isinstance(batch.plan, NativePlan) or batch.irregular or not isinstance(state, dict):
        return None
    if any(group["max_grad_norm"] is not None or isinstance(group["lr"], Tensor) for group in groups):
        return None
    from ._native import ReadyStep

    table, parameters, watched = batch.plan.table, prepared.parameters, prepared.watched
    step = ReadyStep(
        snapshot.READER, table, batch.positions, parameters, watched, prepared.updated, increment_version
    )
    return Ready(step, made) if step.remember(groups, state, *owners_and_masks(masks)) else None
