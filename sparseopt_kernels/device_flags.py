"""Which parameters make their first step, and which are stale, told in a device's own memory.

A step that AMP skips because of an overflow changes nothing, not even that. Whether it was skipped is
known to the device; the host would have to wait for it. So the flags are raised by the host, and lowered
by the device itself after a step that was not skipped.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .kernels.contract import Batch
from .kernels.device import capturing, refuse_capture, upload


class DeviceFlags:
    """The flags of all parameters of an optimizer that are on one device: ``Batch.flags``.

    Args:
        device: where.
        count: how many parameters the optimizer has.
        former: what is known of the first of them.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """

    def __init__(self, device: torch.device, count: int, former: DeviceFlags | None = None) -> None:
        refuse_capture()
        self._device = device
        self.flags = torch.zeros(count, 2, device=device)
        self._maybe_up: set[int] = set()  # positions
        if former is not None:
            self.flags[: len(former.flags)] = former.flags
            self._maybe_up |= former._maybe_up
        self._present: list[int] = []
        self._absent: tuple[list[int], Tensor] | None = None

    def raise_for(self, batches: Sequence[Batch]) -> None:
        """Before a step: raise what its entries say.

        Raises:
            RuntimeError: there is something to raise while a CUDA graph is captured: every replay would
                be a first step.
        """
        entries = [entry for batch in batches for entry in batch.entries]
        self._present = [i for batch in batches for i in batch.positions]
        if not any(entry.first_step or entry.stale for entry in entries):
            return
        refuse_capture()
        raised = torch.zeros(self.flags.shape)
        for entry, position in zip(entries, self._present, strict=True):
            if entry.first_step or entry.stale:
                raised[position] = torch.tensor([entry.first_step, entry.stale])
                self._maybe_up.add(position)
        torch.maximum(self.flags, upload(raised, self._device), out=self.flags)

    def lower(self, found_inf: Tensor | None) -> None:
        """After a step: lower the flags of what it updated, unless it was skipped."""
        if not self._maybe_up:
            return
        # A flag is 0 or 1: it stays where this is not 0.
        keep = found_inf
        if len(self._present) < len(self.flags):
            keep = self._absentees() if found_inf is None else self._absentees() + found_inf
        if keep is None:
            self.flags.zero_()
        else:
            torch.minimum(self.flags, keep, out=self.flags)
        if found_inf is None and not capturing():
            self._maybe_up.difference_update(self._present)

    def _absentees(self) -> Tensor:
        """1 for parameters that are not in this step, 0 for those that are."""
        if self._absent is not None and self._absent[0] == self._present:
            return self._absent[1]
        there = set(self._present)
        absent = upload(torch.tensor([[float(i not in there)] for i in range(len(self.flags))]), self._device)
        if not capturing():  # else it is written when the graph runs
            self._absent = (self._present, absent)
        return absent
