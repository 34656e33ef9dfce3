"""The sectors of a tensor as Triton functions: the chunks that programs walk, and ``c_i`` of their weights.

A sector has WEIGHTS weights. Whoever walks it reads and writes them.
"""

# What Triton compiles has no annotations but its own.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import Any, NamedTuple

import triton
import triton.language as tl

from sparseopt_kernels.kernels.gpu.tables import SectorRow

_SECTOR_WIDTH = tl.constexpr(len(SectorRow._fields))


class Chunk(NamedTuple):
    """What a program walks at a time: sectors of one tensor, of which not all need be there, [SECTORS, 1]."""

    sector: Any  # their numbers
    active: Any  # the mask bits of their weights; 0 for what is not there
    is_last: Any  # whether it is the tensor's last one


class SectorFactors(NamedTuple):
    """c_i of the weights of sectors, [SECTORS, 1]: one up to a column, another from there on."""

    until: Any
    first: Any
    second: Any


class Rest(NamedTuple):
    """The last weights of a tensor, less than 16 bytes, [SECTORS / WEIGHTS, WEIGHTS].

    Only the first row is live, but each thread has a place. With fewer places than threads, several threads
    would read a weight that one of them writes, and nothing says which comes first.
    """

    e: Any
    active: Any
    live: Any
    c: Any


@triton.jit
def chunk_of(table, chunk_to_tensor, number, count, otherwise, WEIGHTS: tl.constexpr, SECTORS: tl.constexpr):
    """Whose chunk it is, and what is in it; ``otherwise`` and nothing where there are not so many."""
    t = tl.load(chunk_to_tensor.to(tl.pointer_type(tl.int32)) + number, mask=number < count, other=otherwise)
    return t, chunk_with(sector_row(table, t), number, WEIGHTS, SECTORS)


@triton.jit
def chunk_with(entry, number, WEIGHTS: tl.constexpr, SECTORS: tl.constexpr):
    first = (number - entry.first_chunk.to(tl.int32)) * SECTORS
    length = entry.length.to(tl.int32)
    i = first + tl.arange(0, SECTORS)[:, None]
    there = i < length
    is_listed = entry.listed != 0
    numbers = entry.listed.to(tl.pointer_type(tl.int32))
    listed = tl.load(numbers + i, mask=only_if(is_listed, there), other=0)
    has_bits = only_if(entry.visited_bits != 0, there)
    active = tl.load(bits_at(entry.visited_bits, WEIGHTS) + i, mask=has_bits, other=0).to(tl.int32)
    active = tl.where(only_if(entry.visited_bits == 0, there), (1 << WEIGHTS) - 1, active)
    return Chunk(sector=tl.where(is_listed, listed, i), active=active, is_last=first + SECTORS >= length)


@triton.jit
def only_if(wanted, live):
    """``live`` if ``wanted``, which is one for all: their ``&`` is no boolean in Triton 3.9's interpreter."""
    return tl.where(wanted, live, False)


@triton.jit
def bits_at(address, WEIGHTS: tl.constexpr):
    if WEIGHTS == 8:
        return address.to(tl.pointer_type(tl.uint8))
    else:
        return address.to(tl.pointer_type(tl.uint16))


@triton.jit
def bits_of(active, offset):
    return ((active >> offset) & 1) != 0


@triton.jit
def halves(WEIGHTS: tl.constexpr):
    """The weights of a sector in two halves of 16 bytes, [1, WEIGHTS / 2]."""
    half: tl.constexpr = WEIGHTS // 2
    left = tl.arange(0, half)[None, :]
    return left, left + half


@triton.jit
def first_weights(sector, WEIGHTS: tl.constexpr, WIDE: tl.constexpr):
    """The first weight of each sector: as int64 only where there are so many."""
    if WIDE:
        return sector.to(tl.int64) * WEIGHTS
    else:
        return sector.to(tl.int32) * WEIGHTS


@triton.jit
def vectors_end(entry, ALIGNED: tl.constexpr, WEIGHTS: tl.constexpr, WIDE: tl.constexpr):
    """Where what is accessed by vectors ends."""
    end = entry.elements
    if not WIDE:
        end = end.to(tl.int32)
    if ALIGNED:
        end = end // (WEIGHTS // 2) * (WEIGHTS // 2)
    return end


@triton.jit
def factors_of(entry, chunk, WEIGHTS: tl.constexpr, WIDE: tl.constexpr):
    """Return c_i of the rows in which sectors begin and end, if these are one or two."""
    columns, elements = entry.columns, entry.elements
    if not WIDE:
        columns, elements = columns.to(tl.uint32), elements.to(tl.uint32)
    begin = first_weights(chunk.sector, WEIGHTS, WIDE).to(columns.dtype)
    row = begin // columns
    until = columns - (begin - row * columns)
    needed = only_if(entry.factors != 0, chunk.active != 0)
    crossed = needed & (until < WEIGHTS) & (begin + until < elements)
    at = entry.factors.to(tl.pointer_type(tl.float32)) + row.to(tl.int64)
    first = tl.load(at, mask=needed, other=1.0)
    second = tl.load(at + 1, mask=crossed, other=1.0)
    return SectorFactors(until=until.to(tl.int32), first=first, second=second)


@triton.jit
def factor_at(entry, factors, e, offset, ALIGNED: tl.constexpr, WIDE: tl.constexpr):
    """Return c_i of the weights ``offset`` of sectors that begin with ``e``."""
    c = tl.where(offset < factors.until, factors.first, factors.second)
    if not ALIGNED:
        if entry.columns < 2 * offset.shape[1]:  # there may be more rows in a sector than two
            c = _factor_of(entry, e + offset, WIDE)
    return c


@triton.jit
def _factor_of(entry, e, WIDE: tl.constexpr):
    """Return c_i of weights; 1 for places behind the end of the tensor."""
    columns, elements = entry.columns, entry.elements
    if not WIDE:
        columns, elements = columns.to(tl.uint32), elements.to(tl.uint32)
    row = (e.to(columns.dtype) // columns).to(tl.int64)
    at = entry.factors.to(tl.pointer_type(tl.float32)) + row
    needed = only_if(entry.factors != 0, e.to(columns.dtype) < elements)
    return tl.load(at, mask=needed, other=1.0)


@triton.jit
def rest_of(entry, begin, WEIGHTS: tl.constexpr, SECTORS: tl.constexpr, WIDE: tl.constexpr):
    """The last weights of a tensor, from ``begin`` on."""
    row = tl.arange(0, SECTORS // WEIGHTS)[:, None]
    sector = row.to(tl.int64) * 0 + (entry.elements - 1) // WEIGHTS
    has_mask = only_if(entry.mask_bits != 0, sector >= 0)
    bits = tl.load(bits_at(entry.mask_bits, WEIGHTS) + sector, mask=has_mask, other=0).to(tl.int32)
    bits = tl.where(entry.mask_bits == 0, (1 << WEIGHTS) - 1, bits)
    offset = tl.arange(0, WEIGHTS)[None, :]
    e = first_weights(sector, WEIGHTS, WIDE) + offset
    live = (row == 0) & (bits != 0) & (e >= begin) & (e < entry.elements)
    return Rest(e=e, active=bits_of(bits, offset), live=live, c=_factor_of(entry, e, WIDE))


@triton.jit
def sector_row(table, t):
    at = table.to(tl.pointer_type(tl.int64)) + t * _SECTOR_WIDTH
    return SectorRow(
        parameter=tl.load(at),
        momentum_buffer=tl.load(at + 1),
        mask_bits=tl.load(at + 2),
        listed=tl.load(at + 3),
        visited_bits=tl.load(at + 4),
        factors=tl.load(at + 5),
        columns=tl.load(at + 6),
        elements=tl.load(at + 7),
        rule=tl.load(at + 8),
        ham=tl.load(at + 9),
        first_chunk=tl.load(at + 10),
        length=tl.load(at + 11),
    )


@triton.jit
def chunk_count(chunks):
    return tl.load(chunks.to(tl.pointer_type(tl.int64))).to(tl.int32)
