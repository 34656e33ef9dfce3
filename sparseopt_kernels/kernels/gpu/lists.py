"""What GPU backends keep of masks: the mask bits of each sector of memory, a list of the live ones, and c_i.

A sector is 32 bytes of a parameter, as memory is read: 8 weights of float32, 16 of half precision, 4 of
float64. It is live if one of its weights is active. Sectors are numbered through the whole tensor, whatever
its rows; weights behind its end count as masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...neurons import arithmetic_dtype
from ..contract import Tensors
from ..memory import Rows
from .device import upload

_SECTOR = 32  # bytes
LISTED = 0.4  # of the sectors: where more are live, all of them are walked


class Sectors(NamedTuple):
    """What there is of one mask, all on the device."""

    masks: Tensor  # uint8, or uint16 for half precision (sectors,): the first weight's bit is the lowest
    factors: Tensor  # (2, rows), of the arithmetic type: c_i of Eq. 12, and sqrt(1 - s_i)
    listed: Tensor  # int32 (room,): the live sectors in order, as far as there is room
    bits: Tensor  # as masks (room,): those of the listed sectors
    live: Tensor  # int64, 0-d: how many are live


class ListRow(NamedTuple):
    """What the kernels that make lists read of a mask, as int64."""

    mask: int  # boolean
    rows: int
    columns: int
    elements: int
    first_row: int  # among those of all tensors
    first_program: int
    capacity: int  # how many sectors may be listed
    mean_fan_in: int  # the address of it
    masks: int
    listed: int
    bits: int
    factors: int


class Listing(NamedTuple):
    """The launches that make lists."""

    dtype: torch.dtype  # of the weights
    table: Tensor  # int64 (tensors, columns of ListRow)
    owner: Tensor  # int32 (programs,): whose row of the table each program reads
    fan_in: Tensor  # int32 (rows of all tensors,)
    live: Tensor  # int32, likewise: sectors that begin in a row and are live
    programs: int


def owners(programs: Sequence[int]) -> Tensor:
    """For each program, of which of the tensors it is one, on the host: int32."""
    counts = torch.tensor(programs, device="cpu")
    return torch.arange(len(programs), dtype=torch.int32, device="cpu").repeat_interleave(counts)


class ListKernels(Protocol):
    list_rows: int
    """How many neurons a program has."""

    def count_rows(self, listing: Listing) -> None:
        """Write the masks of all sectors, ``fan_in`` and ``live``."""

    def list_sectors(self, listing: Listing, ends: Tensor) -> None:
        """Write lists and factors. ``ends`` is the sum of ``live`` up to and with each row, int64."""


def weights_per_sector(dtype: torch.dtype) -> int:
    return _SECTOR // dtype.itemsize


def sectors_in(weights: int, lanes: int) -> int:
    return -(-weights // lanes)


def list_masks(
    kernels: ListKernels, tensors: Sequence[Tensors], rows: Sequence[Rows]
) -> list[tuple[Sectors, Tensor]]:
    """Of each mask what is kept of it, and its mean fan-in (0-d, of the arithmetic type).

    Two kernels for all of them, with a cumulative sum in between; nothing waits for the device.

    Args:
        kernels: the backend's.
        tensors: of one device and dtype, with masks.
        rows: theirs.
    """
    parameter = tensors[0].parameter
    device, dtype, arithmetic = parameter.device, parameter.dtype, arithmetic_dtype(parameter.dtype)
    found = [_room_for(t, r) for t, r in zip(tensors, rows, strict=True)]
    means = torch.empty(len(tensors), dtype=arithmetic, device=device)
    table, programs, first_row, first_program = [], [], 0, 0
    for i, (t, r, s) in enumerate(zip(tensors, rows, found, strict=True)):
        assert r.mask is not None
        table.append(
            ListRow(
                mask=r.mask.data_ptr(),
                rows=r.rows,
                columns=r.columns,
                elements=t.parameter.numel(),
                first_row=first_row,
                first_program=first_program,
                capacity=s.listed.numel(),
                mean_fan_in=means.data_ptr() + i * means.itemsize,
                masks=s.masks.data_ptr(),
                listed=s.listed.data_ptr(),
                bits=s.bits.data_ptr(),
                factors=s.factors.data_ptr(),
            )
        )
        programs.append(-(-r.rows // kernels.list_rows))
        first_row += r.rows
        first_program += programs[-1]
    counts = torch.empty(2, first_row, dtype=torch.int32, device=device)
    listing = Listing(
        dtype,
        upload(torch.tensor(table, dtype=torch.int64, device="cpu"), device),
        upload(owners(programs), device),
        fan_in=counts[1],
        live=counts[0],
        programs=first_program,
    )
    kernels.count_rows(listing)
    ends = counts.view(-1).cumsum(0)  # in one: of several rows, PyTorch gives each to a single block
    numbers = listing.table
    last_row = numbers[:, _FIRST_ROW] + numbers[:, _ROWS] - 1
    until = ends.index_select(0, torch.cat([last_row, last_row + first_row]))
    totals = until.diff(prepend=torch.zeros(1, dtype=torch.int64, device=device)).view(2, -1)
    means.copy_(totals[1].double() / numbers[:, _ROWS])
    kernels.list_sectors(listing, ends[:first_row])
    return [(Sectors(*s, live=totals[0, i]), means[i]) for i, s in enumerate(found)]


_FIRST_ROW, _ROWS = ListRow._fields.index("first_row"), ListRow._fields.index("rows")


class _Room(NamedTuple):
    """Of ``Sectors``, what kernels write."""

    masks: Tensor
    factors: Tensor
    listed: Tensor
    bits: Tensor


def _room_for(tensors: Tensors, rows: Rows) -> _Room:
    parameter = tensors.parameter
    lanes = weights_per_sector(parameter.dtype)
    count = sectors_in(parameter.numel(), lanes)
    capacity = int(LISTED * count)
    masks = torch.uint8 if lanes <= 8 else torch.uint16

    def room(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=parameter.device)

    return _Room(
        masks=room(masks, count),
        factors=room(arithmetic_dtype(parameter.dtype), 2, rows.rows),
        listed=room(torch.int32, capacity),
        bits=room(masks, capacity),
    )
