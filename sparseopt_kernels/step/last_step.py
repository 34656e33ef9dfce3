"""The last step of an optimizer: compared with the next one, and made again where nothing has changed.

On a CPU, the native library does both in one call, as long as only numbers change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn.parameter import Parameter

from .. import native_library
from ..kernels.tensor_memory import versions_of
from .change_detection import READER, Observed, State, owners_and_masks
from .preparation import Prepared


class LastStep:
    """A step that was made. It is in one of three states:

    - *unknown* (``NO_STEP``): there was no step, or it was broken off. The next one is prepared anew.
    - *comparable*: what the next step observes can be compared with what this one depended on.
    - *repeatable*: the native library can compare and make it again, in one call.

    Args:
        prepared: its preparation; None: unknown.
        observed: what the next step will observe if nothing changes.
        may_repeat: whether the native library may make the step again, if it can.
    """

    __slots__ = ("_masks", "_prepared", "_repeatable", "_snapshot", "_versions")

    def __init__(
        self,
        prepared: Prepared | None = None,
        observed: Observed | None = None,
        may_repeat: bool = False,
    ) -> None:
        self._prepared = prepared
        # The gradients are let go. The masks must live as long as the snapshot is compared.
        self._snapshot, self._masks = (observed.snapshot, observed.masks) if observed else (None, [])
        self._versions = None if prepared is None else versions_of(prepared.watched)
        self._repeatable = _native_step(prepared, observed, self._versions) if may_repeat else None

    @property
    def is_repeatable(self) -> bool:
        """True if the native library can make the step again."""
        return self._repeatable is not None

    def repeat(self, groups: list[dict[str, Any]], state: State, masks: Mapping[Parameter, Tensor]) -> bool:
        """Make the step again. False, and nothing has happened, if it is not the same any more."""
        if self._repeatable is None or self._prepared is None:
            return False
        prepared = self._prepared
        optimizer = native_library.Optimizer(
            groups, state, *owners_and_masks(masks), prepared.parameters, prepared.watched
        )
        return self._repeatable.repeat(
            optimizer, prepared.updated, increment_version, torch.get_num_threads()
        )

    def is_same(self, observed: Observed) -> bool:
        """Tell if nothing has changed since the step but the numbers in the gradients."""
        return (
            observed.snapshot is not None
            and observed.snapshot == self._snapshot
            and observed.versions == self.versions()
        )

    def versions(self) -> list[int] | None:
        """Return the versions of what is watched after the step; None if they are not known."""
        return self._versions if self._repeatable is None else self._repeatable.versions()


NO_STEP = LastStep()


def _native_step(
    prepared: Prepared | None, observed: Observed | None, versions: list[int] | None
) -> native_library.RepeatableStep | None:
    """Return the step as the native library makes it; None where it takes more than that."""
    if READER is None or prepared is None or observed is None or versions is None:
        return None
    snapshot = observed.snapshot
    if not isinstance(snapshot, native_library.Snapshot):
        return None
    if len(prepared.batches) != 1 or prepared.new_buffers or prepared.batches[0].irregular:
        return None
    batch = prepared.batches[0]
    table = batch.plan.native_table()
    if table is None:
        return None
    return native_library.RepeatableStep(
        reader=READER,
        table=table,
        positions=batch.positions,
        snapshot=snapshot,
        versions=versions,
        dense_norm=prepared.norm_over == "dense",
    )
