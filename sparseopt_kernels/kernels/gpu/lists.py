"""Masks as GPU backends keep them: the mask bits of each sector of memory, and a list of the live ones.

A sector is 32 bytes of a parameter, as memory is read: 8 weights of float32, 16 of half precision, 4 of
float64. It is live if one of its weights is active. Sectors are numbered through the whole tensor, whatever
its rows; weights behind its end count as masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..contract import ParamState
from ..memory import Rows
from .device import upload

_SECTOR = 32  # bytes
# Of the sectors: where more are live, all of them are visited. By the model of an H100 (make gpu-model), a
# list takes 0.75 of the time of that with 0.2 live, 0.98 with 0.3, 1.00 with 0.4, 1.02 with 0.8, if memory
# delivers single sectors; if it delivers pairs, 0.99, 1.00, 1.01 and 1.02.
LISTED = 0.4


class Sectors(NamedTuple):
    """The sectors of one mask, on the device."""

    mask_bits: Tensor  # uint8, or uint16 for half precision (sectors,): the first weight's bit is the lowest
    listed: Tensor  # int32 (room,): the live sectors in order, as far as there is room
    listed_bits: Tensor  # as mask_bits (room,): those of the listed sectors
    live: Tensor  # int64, 0-d: the number of live sectors
    fan_in: Tensor  # int32 (rows,): the number of active weights of each row


class ListRow(NamedTuple):
    """The row of a mask in the table that the kernels of ``ListKernels`` read, as int64."""

    mask: int  # boolean
    rows: int
    columns: int
    elements: int
    first_row: int  # among those of all tensors
    first_program: int
    capacity: int  # how many sectors may be listed
    mask_bits: int
    listed: int
    listed_bits: int


class Listing(NamedTuple):
    """The arguments of the kernels that make lists."""

    dtype: torch.dtype  # of the weights
    table: Tensor  # int64 (tensors, columns of ListRow)
    program_to_tensor: Tensor  # int32 (programs,): the row of the table that each program reads
    fan_in: Tensor  # int32 (rows of all tensors,)
    live: Tensor  # int32, likewise: the live sectors that begin in a row
    programs: int


def tensor_of_programs(programs: Sequence[int]) -> Tensor:
    """Return, for each program, the index of the tensor that it works on: int32, on the host."""
    counts = torch.tensor(programs, device="cpu")
    return torch.arange(len(programs), dtype=torch.int32, device="cpu").repeat_interleave(counts)


class ListKernels(Protocol):
    list_rows: int
    """The neurons of a program."""

    def count_rows(self, listing: Listing) -> None:
        """Write the masks of all sectors, ``fan_in`` and ``live``."""

    def list_sectors(self, listing: Listing, ends: Tensor) -> None:
        """Write the lists. ``ends`` is the sum of ``live`` up to and with each row, int64."""


def weights_per_sector(dtype: torch.dtype) -> int:
    return _SECTOR // dtype.itemsize


def sectors_in(weights: int, per_sector: int) -> int:
    return -(-weights // per_sector)


def list_masks(kernels: ListKernels, params: Sequence[ParamState], rows: Sequence[Rows]) -> list[Sectors]:
    """Make the lists of some masks.

    Two kernels for all of them, with a cumulative sum in between; nothing waits for the device.

    Args:
        kernels: the backend's.
        params: of one device and dtype, with masks.
        rows: theirs.
    """
    device, dtype = params[0].parameter.device, params[0].parameter.dtype
    rooms = [_room_for(param) for param in params]
    table, programs, first_row, first_program = [], [], 0, 0
    for param, r, room in zip(params, rows, rooms, strict=True):
        assert r.mask is not None
        table.append(
            ListRow(
                mask=r.mask.data_ptr(),
                rows=r.rows,
                columns=r.columns,
                elements=param.parameter.numel(),
                first_row=first_row,
                first_program=first_program,
                capacity=room.listed.numel(),
                mask_bits=room.mask_bits.data_ptr(),
                listed=room.listed.data_ptr(),
                listed_bits=room.listed_bits.data_ptr(),
            )
        )
        programs.append(-(-r.rows // kernels.list_rows))
        first_row += r.rows
        first_program += programs[-1]
    counts = torch.empty(2, first_row, dtype=torch.int32, device=device)
    listing = Listing(
        dtype=dtype,
        table=upload(torch.tensor(table, dtype=torch.int64, device="cpu"), device),
        program_to_tensor=upload(tensor_of_programs(programs), device),
        fan_in=counts[1],
        live=counts[0],
        programs=first_program,
    )
    kernels.count_rows(listing)
    ends = listing.live.cumsum(0)
    last_rows = listing.table[:, _FIRST_ROW] + listing.table[:, _ROWS] - 1
    none = torch.zeros(1, dtype=torch.int64, device=device)
    live = ends.index_select(0, last_rows).diff(prepend=none)
    kernels.list_sectors(listing, ends)
    fan_in = torch.split(listing.fan_in, [r.rows for r in rows])
    return [
        Sectors(*room, live=live[i], fan_in=own)
        for i, (room, own) in enumerate(zip(rooms, fan_in, strict=True))
    ]


_FIRST_ROW, _ROWS = ListRow._fields.index("first_row"), ListRow._fields.index("rows")


class _Lists(NamedTuple):
    """The fields of ``Sectors`` that kernels write."""

    mask_bits: Tensor
    listed: Tensor
    listed_bits: Tensor


def _room_for(param: ParamState) -> _Lists:
    parameter = param.parameter
    per_sector = weights_per_sector(parameter.dtype)
    count = sectors_in(parameter.numel(), per_sector)
    capacity = int(LISTED * count)
    bits = torch.uint8 if per_sector <= 8 else torch.uint16

    def room(dtype: torch.dtype, size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device=parameter.device)

    return _Lists(room(bits, count), room(torch.int32, capacity), room(bits, capacity))
