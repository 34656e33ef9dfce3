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

from ..kernels.contract import NormOver
from ..kernels.cpu import NativePlan
from . import snapshot
from .preparation import Prepared
from .snapshot import Look, State, owners_and_masks

if snapshot.READER is not None:
    from .. import _native

if TYPE_CHECKING:
    from .._native import ReadyStep


class Ready:
    """A step that was made, to be made again.

    Args:
        step: that of the native library.
        prepared: what it was prepared from.
    """

    __slots__ = ("_prepared", "_step")

    def __init__(self, step: ReadyStep, prepared: Prepared) -> None:
        self._step, self._prepared = step, prepared

    def make(self, groups: list[dict[str, Any]], state: State, masks: Mapping[Parameter, Tensor]) -> bool:
        """Make the step. False, and nothing has happened, if it is not the same any more."""
        prepared = self._prepared
        optimizer = _native.Optimizer(
            groups, state, *owners_and_masks(masks), prepared.parameters, prepared.watched
        )
        return self._step.make(optimizer, prepared.updated, increment_version, torch.get_num_threads())

    def versions(self) -> list[int]:
        """Of what is watched, after the last step."""
        return self._step.versions()


def ready_again(prepared: Prepared, before: Look, versions: list[int], norm_over: NormOver) -> Ready | None:
    """A step that was made, to be made again. None where it takes more than the native library.

    Args:
        prepared: what it was prepared from.
        before: what was found before it.
        versions: of what is watched, after it.
        norm_over: what counts in the norm of the gradients, where it is limited.
    """
    if snapshot.READER is None or not isinstance(before.snapshot, _native.Snapshot):
        return None
    if len(prepared.batches) != 1 or prepared.new_buffers or prepared.batches[0].irregular:
        return None
    plan, positions = prepared.batches[0].plan, prepared.batches[0].positions
    if not isinstance(plan, NativePlan):
        return None
    dense_norm = norm_over == "dense"
    step = _native.ReadyStep(snapshot.READER, plan.table, positions, before.snapshot, versions, dense_norm)
    return Ready(step, prepared)
