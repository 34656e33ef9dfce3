"""What the Triton kernels are told of a batch: a table of its tensors in device memory, and the launches.

Made when something moves, kept from step to step. No kernel is launched here, and nothing waits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .contract import Batch, Entry
from .device import capturing, upload
from .memory import Rows, walk_rows

TABLE_WIDTH = 10
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The weights of a tile are shared by the 128 threads of a program. As many as leave registers for several
# programs at a time (tests/test_compiled_triton.py): fewer where each is an access of its own.
_SHORT_ROW = 64  # mask bytes, that is 512 columns
_SHORT = {"ROWS": 4, "BYTES": _SHORT_ROW}
_SHORT_UNALIGNED = {"ROWS": 2, "BYTES": _SHORT_ROW}
_LONG = {"ROWS": 1, "BYTES": 128}
_DENSE = {"SIZE": 2048}
_DENSE_UNALIGNED = {"SIZE": 1024}
_GROUPS_PER_LAUNCH = 8  # their rules are arguments of the kernel, of which there are only so many


class Launch(NamedTuple):
    """Tensors that go through the same variant of a kernel."""

    masked: bool
    tile: dict[str, int]
    aligned: bool  # all rows of all tensors are whole numbers of 16 bytes, at multiples of them
    momentum: bool
    groups: slice  # of the optimizer's parameter groups
    owner: Tensor  # int32 (programs,): whose row of the table each program reads


class BatchPlan:
    """The table and the launches of a batch.

    Attributes:
        table: int64 (tensors, 10): addresses of parameter, momentum buffer, packed mask and mean fan-in;
            rows, columns; the first program; position in ``Batch.flags``; group in the launch; whether HAM.
        launches: which programs read it.
        walk: which entries of the batch they are about.
    """

    def __init__(self, batch: Batch) -> None:
        self.walk = walk_rows(batch, DTYPES, pack)
        self._grads_aligned = [grad.data_ptr() % 16 == 0 for grad in self.walk.grads(batch)]
        self._addresses: list[int] | None = None
        self._addresses_on_device: Tensor
        self.table, self.launches = self._lay_out_table(batch.device)

    def takes(self, addresses: list[int]) -> bool:
        """Whether gradients at these addresses are aligned as those that the launches were made for."""
        return addresses == self._addresses or [a % 16 == 0 for a in addresses] == self._grads_aligned

    def on_device(self, addresses: list[int], device: torch.device) -> Tensor:
        """The gradients' addresses, int64: copied to the device if they are not those of the last step."""
        if addresses != self._addresses:
            table = upload(torch.tensor(addresses, dtype=torch.int64), device)
            if capturing():  # it is written when the graph runs
                return table
            self._addresses, self._addresses_on_device = addresses, table
        return self._addresses_on_device

    def _lay_out_table(self, device: torch.device) -> tuple[Tensor, list[Launch]]:
        members: dict[tuple[Any, ...], list[int]] = {}
        for t, entry in enumerate(self.walk.entries):
            members.setdefault(self._variant(t, entry), []).append(t)
        rows: list[list[int]] = [[]] * len(self.walk.entries)
        launches = []
        for (masked, short, aligned, momentum, first_group), tensors in members.items():
            tile = _LONG
            if short:
                tile = _SHORT if aligned else _SHORT_UNALIGNED
            elif not masked:
                tile = _DENSE if aligned else _DENSE_UNALIGNED
            programs: list[int] = []
            for t in tensors:
                entry = self.walk.entries[t]
                plan: Rows = entry.plan
                rows[t] = [
                    entry.parameter.data_ptr(),
                    0 if entry.momentum_buffer is None else entry.momentum_buffer.data_ptr(),
                    0 if plan.bits is None else plan.bits.data_ptr(),
                    0 if plan.mean_fan_in is None else plan.mean_fan_in.data_ptr(),
                    plan.rows,
                    plan.columns,
                    sum(programs),
                    self.walk.positions[t],
                    entry.group - first_group,
                    int(entry.ham),
                ]
                programs.append(-(-plan.rows // tile["ROWS"]) if masked else -(-plan.columns // tile["SIZE"]))
            owner = torch.tensor(tensors, dtype=torch.int32).repeat_interleave(torch.tensor(programs))
            if sum(programs) == 0:  # all of them are empty
                continue
            groups = slice(first_group, first_group + _GROUPS_PER_LAUNCH)
            launches.append(Launch(masked, tile, aligned, momentum, groups, upload(owner, device)))
        table = torch.tensor(rows, dtype=torch.int64).view(len(rows), TABLE_WIDTH)
        return upload(table, device), launches

    def _variant(self, t: int, entry: Entry) -> tuple[Any, ...]:
        """What decides which launch the tensor ``t`` of the table goes into."""
        plan: Rows = entry.plan
        buffer = entry.momentum_buffer
        addresses = [entry.parameter.data_ptr(), 0 if buffer is None else buffer.data_ptr()]
        aligned = self._grads_aligned[t] and all(address % 16 == 0 for address in addresses)
        masked = plan.bits is not None
        aligned = aligned and plan.columns * plan.dtype.itemsize % 16 == 0
        short = masked and plan.columns <= 8 * _SHORT_ROW
        first_group = entry.group // _GROUPS_PER_LAUNCH * _GROUPS_PER_LAUNCH
        return masked, short, aligned, buffer is not None, first_group


def pack(mask: Tensor) -> tuple[Tensor, Tensor]:
    """A boolean matrix as bits, and how many of them are set: uint8 of shape ``(rows, columns / 8, rounded
    up)``, lowest bit first, each row padded with zeros to whole bytes; 0-d int64."""
    rows, columns = mask.shape
    bytes_of_8 = torch.constant_pad_nd(mask.view(torch.uint8), (0, -columns % 8)).view(rows, -1, 8)  # a copy
    bytes_of_8 <<= torch.arange(8, dtype=torch.uint8, device=mask.device)
    return bytes_of_8.sum(dim=2, dtype=torch.uint8), mask.sum()
