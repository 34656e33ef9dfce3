"""Triton kernels that make the lists of new masks (``lists.Sectors``), over many tensors.

``table`` has a ``lists.ListRow`` per tensor. A program has ROWS neurons, and the sectors that begin in them.
Only that program looks at them. The list of a row begins where those of all rows before it end, which is
known once all were counted: so lists are in order, and the same in every run.
"""

# What Triton compiles has no annotations but its own.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, valid-type"

from typing import Any, NamedTuple

import triton
import triton.language as tl

from sparseopt_kernels.kernels.gpu.lists import ListRow
from sparseopt_kernels.kernels.gpu.triton_sectors import bits_at

_WIDTH = tl.constexpr(len(ListRow._fields))


class Own(NamedTuple):
    """The rows of a program, [ROWS, 1]."""

    row: Any
    inside: Any
    begin: Any  # the first weight
    end: Any  # behind the last one
    first: Any  # the first sector that begins in it
    last: Any  # behind the last one
    tiles: Any  # how many there are at most


@triton.jit(do_not_specialize=["table", "program_to_tensor", "fan_in", "live"])
def count_rows(
    table: tl.int64, program_to_tensor: tl.int64, fan_in: tl.int64, live: tl.int64,
    ROWS: tl.constexpr, SECTORS: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Write the mask bits of all sectors and, for each row, the numbers of active weights and of live
    sectors."""
    entry = _list_row(table, tl.load(program_to_tensor.to(tl.pointer_type(tl.int32)) + tl.program_id(0)))
    own = _rows(entry, ROWS, SECTORS, WEIGHTS)
    mask = tl.multiple_of(entry.mask.to(tl.pointer_type(tl.int8)), 16)
    half: tl.constexpr = WEIGHTS // 2
    # The weights before the first sector that begins in the row.
    early = own.begin + tl.arange(0, WEIGHTS)[None, :]
    there = own.inside & (early < own.first * WEIGHTS) & (early < own.end)
    before = tl.load(mask + early, mask=there, other=0) != 0
    active = tl.sum(before.to(tl.int32), axis=1)[:, None]
    found = tl.zeros([ROWS, SECTORS], tl.int32)
    counted = tl.zeros([ROWS, SECTORS], tl.int32)
    for tile in range(0, own.tiles):
        sector = own.first + tile * SECTORS + tl.arange(0, SECTORS)[None, :]
        begins = own.inside & (sector < own.last)
        left, in_left = _half_bits(mask, sector * WEIGHTS, begins, entry.elements, own.end, half)
        right, in_right = _half_bits(mask, sector * WEIGHTS + half, begins, entry.elements, own.end, half)
        bits = left | (right << half)
        mask_bits = bits_at(entry.mask_bits, WEIGHTS)
        tl.store(mask_bits + sector, bits.to(mask_bits.dtype.element_ty), mask=begins)
        found += (bits != 0).to(tl.int32)
        counted += in_left + in_right
    active += tl.sum(counted, axis=1)[:, None]
    at = entry.first_row + own.row
    tl.store(fan_in.to(tl.pointer_type(tl.int32)) + at, active, mask=own.inside)
    tl.store(live.to(tl.pointer_type(tl.int32)) + at, tl.sum(found, axis=1)[:, None], mask=own.inside)


@triton.jit
def _half_bits(mask, begin, there, elements, end, HALF: tl.constexpr):
    """Return the mask bits of half a sector, and the number of those in the row that ends with ``end``."""
    offset = tl.arange(0, HALF)[None, None, :]
    e = begin[:, :, None] + offset
    is_whole = begin + HALF <= elements
    # One access for all of it, but where the tensor ends within it.
    found = tl.load(mask + e, mask=(there & is_whole)[:, :, None], other=0)
    is_cut = there & (begin + HALF > elements)
    if tl.max(is_cut.to(tl.int32)) != 0:
        found += tl.load(mask + e, mask=is_cut[:, :, None] & (e < elements), other=0)
    active = (found != 0).to(tl.int32)
    return tl.sum(active << offset, axis=2), tl.sum(tl.where(e < end[:, :, None], active, 0), axis=2)


@triton.jit(do_not_specialize=["table", "program_to_tensor", "live", "ends"])
def list_sectors(
    table: tl.int64, program_to_tensor: tl.int64, live: tl.int64, ends: tl.int64,
    ROWS: tl.constexpr, SECTORS: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Write the lists of live sectors, as far as there is room for them."""
    entry = _list_row(table, tl.load(program_to_tensor.to(tl.pointer_type(tl.int32)) + tl.program_id(0)))
    own = _rows(entry, ROWS, SECTORS, WEIGHTS)
    at = entry.first_row + own.row
    # `ends` counts the live sectors of the rows of all tensors, up to and with each row.
    to = ends.to(tl.pointer_type(tl.int64))
    before = tl.load(to + entry.first_row - 1, mask=entry.first_row > 0, other=0)
    own_live = tl.load(live.to(tl.pointer_type(tl.int32)) + at, mask=own.inside, other=0)
    place = tl.load(to + at, mask=own.inside, other=0) - own_live - before
    for tile in range(0, own.tiles):
        sector = own.first + tile * SECTORS + tl.arange(0, SECTORS)[None, :]
        mask_bits = bits_at(entry.mask_bits, WEIGHTS)
        bits = tl.load(mask_bits + sector, mask=own.inside & (sector < own.last), other=0)
        is_live = (bits != 0).to(tl.int32)
        position = place + tl.cumsum(is_live, axis=1) - is_live
        wanted = (bits != 0) & (position < entry.capacity)
        tl.store(entry.listed.to(tl.pointer_type(tl.int32)) + position, sector.to(tl.int32), mask=wanted)
        tl.store(bits_at(entry.listed_bits, WEIGHTS) + position, bits, mask=wanted)
        place += tl.sum(is_live, axis=1)[:, None]


@triton.jit
def _rows(entry, ROWS: tl.constexpr, SECTORS: tl.constexpr, WEIGHTS: tl.constexpr):
    row = (tl.program_id(0) - entry.first_program) * ROWS + tl.arange(0, ROWS)[:, None]
    begin = row * entry.columns
    end = begin + entry.columns
    return Own(
        row=row,
        inside=row < entry.rows,
        begin=begin,
        end=end,
        first=tl.cdiv(begin, WEIGHTS),
        last=tl.cdiv(end, WEIGHTS),
        tiles=tl.cdiv(entry.columns, WEIGHTS * SECTORS),
    )


@triton.jit
def _list_row(table, t):
    at = table.to(tl.pointer_type(tl.int64)) + t * _WIDTH
    return ListRow(
        mask=tl.load(at),
        rows=tl.load(at + 1),
        columns=tl.load(at + 2),
        elements=tl.load(at + 3),
        first_row=tl.load(at + 4),
        first_program=tl.load(at + 5),
        capacity=tl.load(at + 6),
        mask_bits=tl.load(at + 7),
        listed=tl.load(at + 8),
        listed_bits=tl.load(at + 9),
    )
