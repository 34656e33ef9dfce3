"""The update rule and the gradient norm, as Triton kernels over many tensors.

Memory is read in sectors of 32 bytes, so the mask bits of the weights of a sector make the predicate of
their accesses. It is constant along them, so that accesses stay vectors of 16 bytes: a predicate per element
would break each into scalar ones. Nothing here is particular to NVIDIA.

``masked_step`` counts a neuron's fan-in from its mask and updates it, in one pass: for a mask that is new.
``sector_step`` walks what ``triton_lists`` has made of it, from the next step on: programs have equal work,
whatever the shapes.

Addresses (tables, gradients, AMP's scalars, ``numbers``, ``sums``) are int64, 0 being none: Triton
would compile anew for None, and for pointers of another alignment. ``rules`` is a tuple of
``triton.RuleArgument``. TYPE is what weights are stored as; all arithmetic is float32.
"""

# What Triton compiles has no annotations but its own.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, valid-type"

from typing import Any, NamedTuple

import triton
import triton.language as tl

from sparseopt_kernels.kernels.gpu.tables import StepRow
from sparseopt_kernels.kernels.gpu.triton_sectors import (
    bits_of,
    chunk_count,
    chunk_of,
    chunk_with,
    factor_at,
    factors_of,
    first_weights,
    halves,
    only_if,
    rest_of,
    sector_row,
    vectors_end,
)
from sparseopt_kernels.kernels.gpu.triton_update_rule import (
    Weights,
    correction_factor,
    rule_of,
    update_weights,
)

_STEP_WIDTH = tl.constexpr(len(StepRow._fields))


class Memory(NamedTuple):
    """The addresses of a tensor's parameter, momentum buffer and gradient; whether there is a buffer."""

    p: Any
    b: Any
    g: Any
    has_b: Any


@triton.jit(do_not_specialize=["table", "grads", "program_to_tensor", "found_inf", "grad_scale", "numbers"])
def masked_step(
    table: tl.int64, grads: tl.int64, program_to_tensor: tl.int64, found_inf: tl.int64, grad_scale: tl.int64,
    numbers: tl.int64, rules,
    TYPE: tl.constexpr, ALIGNED: tl.constexpr, MOMENTUM: tl.constexpr, HAM: tl.constexpr,
    WEIGHTS: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """Updates ROWS neurons per program, UNITS times WEIGHTS of each at a time; their fan-in it counts
    in pieces of COUNTED weights."""
    if found_inf != 0:
        if tl.load(found_inf.to(tl.pointer_type(tl.float32))) != 0:
            return
    t = tl.load(program_to_tensor.to(tl.pointer_type(tl.int32)) + tl.program_id(0))
    entry = _step_row(table, t)
    columns = entry.columns.to(tl.int32)
    mask = tl.multiple_of(entry.mask.to(tl.pointer_type(tl.int8)), 16)
    if ALIGNED:
        columns = tl.multiple_of(columns, WEIGHTS // 2)
    row = (tl.program_id(0) - entry.first_program.to(tl.int32)) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = row < entry.rows
    begin = row.to(tl.int64) * columns
    counted = tl.zeros([ROWS, COUNTED], tl.int32)
    for at in range(0, columns, COUNTED):
        column = at + tl.arange(0, COUNTED)[None, :]
        weights = tl.load(mask + begin + column, mask=inside & (column < columns), other=0)
        counted += (weights != 0).to(tl.int32)
    fan_in = tl.sum(counted, axis=1)[:, None].to(tl.float32)
    rule = rule_of(rules, entry.rule, numbers, grad_scale)
    is_corrected = entry.divisor != 0
    divisor = tl.load(entry.divisor.to(tl.pointer_type(tl.float32)), mask=is_corrected, other=1.0)
    c = tl.where(is_corrected, correction_factor(fan_in, divisor), 1.0)
    scale = (c * rule.gamma)[:, :, None]

    to = _memory(entry.parameter, entry.momentum_buffer, grads, t, TYPE, ALIGNED, ALIGNED)
    begin, inside = begin[:, :, None], inside[:, :, None]
    to = Memory(p=to.p + begin, b=to.b + begin, g=to.g + begin, has_b=to.has_b)
    left, right = _unit_columns(WEIGHTS, UNITS)
    mask_left = _mask_of(mask + begin, left, columns, inside)
    mask_right = _mask_of(mask + begin, right, columns, inside)
    for _ in range(0, columns, WEIGHTS * UNITS):
        # The next masks are on their way while this tile is updated.
        next_left = _mask_of(mask + begin, left + WEIGHTS * UNITS, columns, inside)
        next_right = _mask_of(mask + begin, right + WEIGHTS * UNITS, columns, inside)
        active_left, active_right = mask_left != 0, mask_right != 0
        is_live = _any(active_left) | _any(active_right)
        live_left, live_right = is_live & (left < columns), is_live & (right < columns)
        first = _read(to, left, live_left, MOMENTUM)
        second = _read(to, right, live_right, MOMENTUM)
        first = update_weights(first, scale, rule, to.has_b, entry.ham != 0, MOMENTUM, HAM)
        second = update_weights(second, scale, rule, to.has_b, entry.ham != 0, MOMENTUM, HAM)
        _write(to, left, active_left, live_left, first, TYPE, MOMENTUM)
        _write(to, right, active_right, live_right, second, TYPE, MOMENTUM)
        left, right = left + WEIGHTS * UNITS, right + WEIGHTS * UNITS
        mask_left, mask_right = next_left, next_right


@triton.jit(
    do_not_specialize=["table", "grads", "chunk_to_tensor", "chunks", "found_inf", "grad_scale", "numbers"]
)
def sector_step(
    table: tl.int64, grads: tl.int64, chunk_to_tensor: tl.int64, chunks: tl.int64, found_inf: tl.int64,
    grad_scale: tl.int64, numbers: tl.int64, rules,
    TYPE: tl.constexpr, ALIGNED: tl.constexpr, GRADS_ALIGNED: tl.constexpr, WIDE: tl.constexpr,
    MOMENTUM: tl.constexpr, HAM: tl.constexpr, WEIGHTS: tl.constexpr, SECTORS: tl.constexpr,
):  # fmt: skip
    """Updates the live sectors of all tensors, SECTORS at a time."""
    if found_inf != 0:
        if tl.load(found_inf.to(tl.pointer_type(tl.float32))) != 0:
            return
    rule = rule_of(rules, 0, numbers, grad_scale)
    count = chunk_count(chunks)
    t, chunk = chunk_of(table, chunk_to_tensor, tl.program_id(0), count, 0, WEIGHTS, SECTORS)
    for number in range(tl.program_id(0), count, tl.num_programs(0)):
        entry = sector_row(table, t)
        if len(rules) > 1:
            rule = rule_of(rules, entry.rule, numbers, grad_scale)
        to = _memory(entry.parameter, entry.momentum_buffer, grads, t, TYPE, ALIGNED, GRADS_ALIGNED)
        e = first_weights(chunk.sector, WEIGHTS, WIDE)
        end = vectors_end(entry, ALIGNED, WEIGHTS, WIDE)
        left, right = halves(WEIGHTS)
        live_left = (chunk.active != 0) & (e + left < end)
        live_right = (chunk.active != 0) & (e + right < end)
        # A thread has both halves of a sector, of 16 bytes. All is asked for before any is waited for, the
        # next chunk included.
        first = _read(to, e + left, live_left, MOMENTUM)
        second = _read(to, e + right, live_right, MOMENTUM)
        factors = factors_of(entry, chunk, WEIGHTS, WIDE)
        next_t, following = chunk_of(
            table, chunk_to_tensor, number + tl.num_programs(0), count, t, WEIGHTS, SECTORS
        )
        c = factor_at(entry, factors, e, left, ALIGNED, WIDE)
        first = update_weights(first, c * rule.gamma, rule, to.has_b, entry.ham != 0, MOMENTUM, HAM)
        c = factor_at(entry, factors, e, right, ALIGNED, WIDE)
        second = update_weights(second, c * rule.gamma, rule, to.has_b, entry.ham != 0, MOMENTUM, HAM)
        _write(to, e + left, bits_of(chunk.active, left), live_left, first, TYPE, MOMENTUM)
        _write(to, e + right, bits_of(chunk.active, right), live_right, second, TYPE, MOMENTUM)
        if ALIGNED:
            if chunk.is_last & (end != entry.elements):
                rest = rest_of(entry, end, WEIGHTS, SECTORS, WIDE)
                weights = _read(to, rest.e, rest.live, MOMENTUM)
                weights = update_weights(
                    weights, rest.c * rule.gamma, rule, to.has_b, entry.ham != 0, MOMENTUM, HAM
                )
                _write(to, rest.e, rest.active, rest.live, weights, TYPE, MOMENTUM)
        t, chunk = next_t, following


@triton.jit(do_not_specialize=["table", "grads", "chunk_to_tensor", "chunks", "sums"])
def sector_squares(
    table: tl.int64, grads: tl.int64, chunk_to_tensor: tl.int64, chunks: tl.int64, sums: tl.int64,
    TYPE: tl.constexpr, ALIGNED: tl.constexpr, GRADS_ALIGNED: tl.constexpr, WIDE: tl.constexpr,
    WEIGHTS: tl.constexpr, SECTORS: tl.constexpr,
):  # fmt: skip
    """Write each program's sum of ``(c_i g)^2`` over its active weights, and the rounding error of that
    sum."""
    total, error = 0.0, 0.0
    for number in range(tl.program_id(0), chunk_count(chunks), tl.num_programs(0)):
        t = tl.load(chunk_to_tensor.to(tl.pointer_type(tl.int32)) + number)
        entry = sector_row(table, t)
        to = _memory(entry.parameter, entry.momentum_buffer, grads, t, TYPE, ALIGNED, GRADS_ALIGNED)
        chunk = chunk_with(entry, number, WEIGHTS, SECTORS)
        factors = factors_of(entry, chunk, WEIGHTS, WIDE)
        e = first_weights(chunk.sector, WEIGHTS, WIDE)
        end = vectors_end(entry, ALIGNED, WEIGHTS, WIDE)
        left, right = halves(WEIGHTS)
        c_left = factor_at(entry, factors, e, left, ALIGNED, WIDE)
        c_right = factor_at(entry, factors, e, right, ALIGNED, WIDE)
        is_live = chunk.active != 0
        squares = _squares(to, e + left, bits_of(chunk.active, left), is_live & (e + left < end), c_left)
        squares += _squares(to, e + right, bits_of(chunk.active, right), is_live & (e + right < end), c_right)
        square = tl.sum(squares)
        if ALIGNED:
            if chunk.is_last & (end != entry.elements):
                rest = rest_of(entry, end, WEIGHTS, SECTORS, WIDE)
                square += tl.sum(_squares(to, rest.e, rest.active, rest.live, rest.c))
        added = total + square
        part = added - total
        lost = (total - (added - part)) + (square - part)
        error += tl.where(added < float("inf"), lost, 0.0)  # infinity minus itself would be NaN
        total = added
    own = sums.to(tl.pointer_type(tl.float32)) + 2 * tl.program_id(0)
    tl.store(own, total)
    tl.store(own + 1, error)


@triton.jit
def _read(at, e, live, MOMENTUM: tl.constexpr):
    p = tl.load(at.p + e, mask=live, other=0.0).to(tl.float32)
    g = tl.load(at.g + e, mask=live, other=0.0).to(tl.float32)
    b = g
    if MOMENTUM:
        b = tl.load(at.b + e, mask=only_if(at.has_b, live), other=0.0).to(tl.float32)
    return Weights(p=p, b=b, g=g)


@triton.jit
def _write(at, e, active, live, weights, TYPE: tl.constexpr, MOMENTUM: tl.constexpr):
    """Zero is written where weights are not active."""
    if MOMENTUM:
        tl.store(at.b + e, tl.where(active, weights.b, 0.0).to(TYPE), mask=only_if(at.has_b, live))
    tl.store(at.p + e, tl.where(active, weights.p, 0.0).to(TYPE), mask=live)


@triton.jit
def _squares(at, e, active, live, c):
    g = tl.load(at.g + e, mask=live, other=0.0).to(tl.float32)
    g = tl.where(active, g * c, 0.0)
    return g * g


@triton.jit
def _unit_columns(WEIGHTS: tl.constexpr, UNITS: tl.constexpr):
    """The columns of a row's first UNITS, in two halves, [1, UNITS, WEIGHTS / 2]."""
    half: tl.constexpr = WEIGHTS // 2
    left = tl.arange(0, UNITS)[None, :, None] * WEIGHTS + tl.arange(0, half)[None, None, :]
    return left, left + half


@triton.jit
def _mask_of(mask, column, columns, inside):
    return tl.load(mask + column, mask=inside & (column < columns), other=0)


@triton.jit
def _any(active):
    return tl.max(active.to(tl.int32), axis=2, keep_dims=True) != 0


@triton.jit
def _step_row(table, t):
    at = table.to(tl.pointer_type(tl.int64)) + t * _STEP_WIDTH
    return StepRow(
        parameter=tl.load(at),
        momentum_buffer=tl.load(at + 1),
        mask=tl.load(at + 2),
        divisor=tl.load(at + 3),
        rows=tl.load(at + 4),
        columns=tl.load(at + 5),
        first_program=tl.load(at + 6),
        rule=tl.load(at + 7),
        ham=tl.load(at + 8),
    )


@triton.jit
def _memory(
    parameter, momentum_buffer, grads, t,
    TYPE: tl.constexpr, ALIGNED: tl.constexpr, GRADS_ALIGNED: tl.constexpr,
):  # fmt: skip
    p = parameter.to(tl.pointer_type(TYPE))
    b = momentum_buffer.to(tl.pointer_type(TYPE))
    g = tl.load(grads.to(tl.pointer_type(tl.int64)) + t).to(tl.pointer_type(TYPE))
    if ALIGNED:
        p, b = tl.multiple_of(p, 16), tl.multiple_of(b, 16)
    if GRADS_ALIGNED:
        g = tl.multiple_of(g, 16)
    return Memory(p=p, b=b, g=g, has_b=momentum_buffer != 0)
