"""What runs on the GPU: the update rule and the gradient norm, as Triton kernels over many tensors.

A mask byte covers eight weights: 32 bytes of float32, one sector of memory. It is the predicate of every
access, constant along the eight, so that accesses stay vectors of 16 bytes: a predicate per element would
break each into scalar ones. Nothing here is particular to NVIDIA.

``table`` has a ``triton_plan.TableRow`` per tensor, ``grads`` the addresses of the gradients, ``owner`` the
tensor of each program, ``rules`` a ``triton.RuleArgument`` per parameter group. TYPE is what weights are
stored as; all arithmetic is float32.
"""

# What Triton compiles has no annotations but its own.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import Any, NamedTuple

import triton
import triton.language as tl

from sparseopt_kernels.kernels.triton_plan import TableRow

_COLUMNS = TableRow._fields
TABLE_WIDTH = tl.constexpr(len(_COLUMNS))
PARAMETER = tl.constexpr(_COLUMNS.index("parameter"))
MOMENTUM_BUFFER = tl.constexpr(_COLUMNS.index("momentum_buffer"))
BITS = tl.constexpr(_COLUMNS.index("bits"))
MEAN_FAN_IN = tl.constexpr(_COLUMNS.index("mean_fan_in"))
NUMBER_OF_ROWS = tl.constexpr(_COLUMNS.index("rows"))
NUMBER_OF_COLUMNS = tl.constexpr(_COLUMNS.index("columns"))
FIRST_PROGRAM = tl.constexpr(_COLUMNS.index("first_program"))
GROUP = tl.constexpr(_COLUMNS.index("group"))
IN_HAM = tl.constexpr(_COLUMNS.index("ham"))


class Memory(NamedTuple):
    """The addresses of a tensor's parameter, momentum buffer and gradient."""

    p: Any
    b: Any
    g: Any


class Shape(NamedTuple):
    """The rest of a table's row."""

    bits: Any
    mean_fan_in: Any
    rows: Any
    columns: Any
    first_program: Any
    group: Any
    ham: Any


class Rule(NamedTuple):
    """The rule of a group, as numbers. Gamma has the sign of ``maximize`` and AMP's scale in it."""

    lr: Any
    momentum: Any
    fresh: Any  # 1 - dampening
    weight_decay: Any
    nesterov: Any
    ham_alpha: Any
    ham_beta: Any
    correction: Any  # 0 for "none", 1 for "layer" (Eq. 12), 2 for "unnormalized"
    gamma: Any


@triton.jit
def masked_step(
    table, grads, owner, found_inf, grad_scale, rules,
    TYPE: tl.constexpr, ALIGNED: tl.constexpr, MOMENTUM: tl.constexpr, HAM: tl.constexpr,
    ROWS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """Updates ROWS neurons per program, a tile of BYTES mask bytes (8 * BYTES weights) of each at a time."""
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    t = tl.load(owner + tl.program_id(0))
    at = _memory(table, grads, t, TYPE, ALIGNED)
    shape = _shape(table, t, TYPE, ALIGNED)
    row = (tl.program_id(0) - shape.first_program) * ROWS + tl.arange(0, ROWS)
    row_bytes = tl.cdiv(shape.columns, 8)
    inside = (row < shape.rows)[:, None]
    bits = shape.bits + (row * row_bytes)[:, None]
    tiles = tl.cdiv(row_bytes, BYTES)
    byte, fan_in = _count(bits, tiles, row_bytes, inside, ROWS, BYTES)
    rule = _rule(rules, shape.group, grad_scale)
    scale = (_correction_factor(fan_in, shape, rule.correction) * rule.gamma)[:, None, None]
    # Backwards: the bytes of the last tile are at hand, so those of a row of one tile are loaded once.
    for i in range(0, tiles):
        tile = tiles - 1 - i
        column, active = _columns(tile, byte, BYTES)
        live = (byte != 0)[:, :, None] & (column < shape.columns)
        e = (row * shape.columns)[:, None, None] + column
        _update(at, e, active, live, scale, rule, shape.ham, TYPE, MOMENTUM, HAM)
        byte = _mask_bytes(bits, tile - 1, row_bytes, inside, BYTES)


@triton.jit
def dense_step(
    table, grads, owner, found_inf, grad_scale, rules,
    TYPE: tl.constexpr, ALIGNED: tl.constexpr, MOMENTUM: tl.constexpr, HAM: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """Updates SIZE weights of a tensor without a mask per program."""
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    t = tl.load(owner + tl.program_id(0))
    at = _memory(table, grads, t, TYPE, ALIGNED)
    shape = _shape(table, t, TYPE, ALIGNED)
    e = (tl.program_id(0) - shape.first_program) * SIZE + tl.arange(0, SIZE)
    rule = _rule(rules, shape.group, grad_scale)
    inside = e < shape.columns
    _update(at, e, inside, inside, rule.gamma, rule, shape.ham, TYPE, MOMENTUM, HAM)


@triton.jit
def _update(
    at, e, active, live, scale, rule, ham,
    TYPE: tl.constexpr, MOMENTUM: tl.constexpr, HAM: tl.constexpr,
):  # fmt: skip
    """The update rule for the elements ``e`` where ``live``; zero where not ``active``. Operations are those
    of update_rule.h."""
    p = tl.load(at.p + e, mask=live, other=0.0).to(tl.float32)
    g = tl.load(at.g + e, mask=live, other=0.0).to(tl.float32) * scale
    # Without weight decay an infinite weight stays one: 0 * inf would make it NaN.
    d = tl.where(rule.weight_decay == 0, g, tl.fma(p, rule.weight_decay, g))
    u = d
    if MOMENTUM:
        b = tl.load(at.b + e, mask=live, other=0.0).to(tl.float32)
        b = tl.fma(d, rule.fresh, b * rule.momentum)
        u = tl.where(rule.nesterov != 0, tl.fma(b, rule.momentum, d), b)
        tl.store(at.b + e, tl.where(active, b, 0.0).to(TYPE), mask=live)
    p = tl.fma(u, -rule.lr, p)
    if HAM:
        sign = (p > 0).to(tl.float32) - (p < 0).to(tl.float32)
        exponent = -rule.lr * tl.fma(sign * rule.ham_alpha, g, rule.ham_beta)
        exponent = tl.where(exponent < -5.0, -5.0, tl.where(exponent > 5.0, 5.0, exponent))
        wanted = (ham != 0) & ((rule.ham_alpha != 0) | (rule.ham_beta != 0))
        p = tl.where(wanted, p * tl.exp(exponent), p)
    tl.store(at.p + e, tl.where(active, p, 0.0).to(TYPE), mask=live)


@triton.jit
def masked_squares(
    table, grads, owner, rules, sums,
    TYPE: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """Each program's sum of ``(c_i g)^2`` over its active weights, and that sum's rounding error."""
    t = tl.load(owner + tl.program_id(0))
    at = _memory(table, grads, t, TYPE, ALIGNED)
    shape = _shape(table, t, TYPE, ALIGNED)
    row = (tl.program_id(0) - shape.first_program) * ROWS + tl.arange(0, ROWS)
    row_bytes = tl.cdiv(shape.columns, 8)
    inside = (row < shape.rows)[:, None]
    bits = shape.bits + (row * row_bytes)[:, None]
    tiles = tl.cdiv(row_bytes, BYTES)
    byte, fan_in = _count(bits, tiles, row_bytes, inside, ROWS, BYTES)
    rule = _rule(rules, shape.group, None)
    scale = _correction_factor(fan_in, shape, rule.correction)[:, None, None]
    total, error = 0.0, 0.0
    for i in range(0, tiles):
        tile = tiles - 1 - i
        column, active = _columns(tile, byte, BYTES)
        live = (byte != 0)[:, :, None] & (column < shape.columns)
        e = (row * shape.columns)[:, None, None] + column
        g = tl.load(at.g + e, mask=live, other=0.0).to(tl.float32)
        g = tl.where(active, g * scale, 0.0)
        square = tl.sum(g * g)
        added = total + square
        part = added - total
        lost = (total - (added - part)) + (square - part)
        error += tl.where(added < float("inf"), lost, 0.0)  # infinity minus itself would be NaN
        total = added
        byte = _mask_bytes(bits, tile - 1, row_bytes, inside, BYTES)
    tl.store(sums + 2 * tl.program_id(0), total)
    tl.store(sums + 2 * tl.program_id(0) + 1, error)


@triton.jit
def dense_squares(
    table, grads, owner, sums, TYPE: tl.constexpr, ALIGNED: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    """Each program's sum of ``g^2``; 0 for its error, which is not known."""
    t = tl.load(owner + tl.program_id(0))
    at = _memory(table, grads, t, TYPE, ALIGNED)
    shape = _shape(table, t, TYPE, ALIGNED)
    e = (tl.program_id(0) - shape.first_program) * SIZE + tl.arange(0, SIZE)
    g = tl.load(at.g + e, mask=e < shape.columns, other=0.0).to(tl.float32)
    tl.store(sums + 2 * tl.program_id(0), tl.sum(g * g))
    tl.store(sums + 2 * tl.program_id(0) + 1, 0.0)


@triton.jit
def _memory(table, grads, t, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    row = table + t * TABLE_WIDTH
    p = tl.load(row + PARAMETER).to(tl.pointer_type(TYPE))
    b = tl.load(row + MOMENTUM_BUFFER).to(tl.pointer_type(TYPE))
    g = tl.load(grads + t).to(tl.pointer_type(TYPE))
    if ALIGNED:
        p, b, g = tl.multiple_of(p, 16), tl.multiple_of(b, 16), tl.multiple_of(g, 16)
    return Memory(p=p, b=b, g=g)


@triton.jit
def _shape(table, t, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    row = table + t * TABLE_WIDTH
    columns = tl.load(row + NUMBER_OF_COLUMNS)
    if ALIGNED:  # rows, and a dense tensor, are whole numbers of 16 bytes
        columns = tl.multiple_of(columns, 128 // TYPE.primitive_bitwidth)
    return Shape(
        bits=tl.load(row + BITS).to(tl.pointer_type(tl.uint8)),
        mean_fan_in=tl.load(row + MEAN_FAN_IN).to(tl.pointer_type(tl.float32)),
        rows=tl.load(row + NUMBER_OF_ROWS),
        columns=columns,
        first_program=tl.load(row + FIRST_PROGRAM),
        group=tl.load(row + GROUP),
        ham=tl.load(row + IN_HAM),
    )


@triton.jit
def _count(bits, tiles, row_bytes, inside, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """The mask bytes of the last tile, and the fan-in of each row."""
    byte = tl.zeros([ROWS, BYTES], tl.int32)
    fan_in = tl.zeros([ROWS], tl.int32)
    for tile in range(0, tiles):
        byte = _mask_bytes(bits, tile, row_bytes, inside, BYTES)
        fan_in += tl.sum(_count_ones(byte), axis=1)
    return byte, fan_in


@triton.jit
def _mask_bytes(bits, tile, row_bytes, inside, BYTES: tl.constexpr):
    o = tile * BYTES + tl.arange(0, BYTES)[None, :]
    return tl.load(bits + o, mask=inside & (o >= 0) & (o < row_bytes), other=0).to(tl.int32)


@triton.jit
def _count_ones(byte):
    byte = byte - ((byte >> 1) & 0x55)
    byte = (byte & 0x33) + ((byte >> 2) & 0x33)
    return (byte + (byte >> 4)) & 0x0F


@triton.jit
def _columns(tile, byte, BYTES: tl.constexpr):
    """The columns of a tile, [1, BYTES, 8], and which of them are active, [ROWS, BYTES, 8]."""
    lane = tl.arange(0, 8)[None, None, :]
    column = (tile * BYTES + tl.arange(0, BYTES))[None, :, None] * 8 + lane
    return column, ((byte[:, :, None] >> lane) & 1) != 0


@triton.jit
def _rule(rules, group, grad_scale):
    """The rule of a group."""
    lr, momentum, fresh = _number(rules[0].lr), rules[0].momentum, rules[0].fresh
    weight_decay, nesterov = rules[0].weight_decay, rules[0].nesterov
    alpha, beta, correction = rules[0].ham_alpha, rules[0].ham_beta, rules[0].correction
    gamma = _number(rules[0].gamma) * rules[0].sign
    for k in tl.static_range(1, len(rules)):
        is_it = group == k
        lr = tl.where(is_it, _number(rules[k].lr), lr)
        momentum = tl.where(is_it, rules[k].momentum, momentum)
        fresh = tl.where(is_it, rules[k].fresh, fresh)
        weight_decay = tl.where(is_it, rules[k].weight_decay, weight_decay)
        nesterov = tl.where(is_it, rules[k].nesterov, nesterov)
        alpha = tl.where(is_it, rules[k].ham_alpha, alpha)
        beta = tl.where(is_it, rules[k].ham_beta, beta)
        correction = tl.where(is_it, rules[k].correction, correction)
        gamma = tl.where(is_it, _number(rules[k].gamma) * rules[k].sign, gamma)
    if grad_scale is not None:
        gamma = tl.div_rn(gamma, tl.load(grad_scale))
    return Rule(
        lr=lr,
        momentum=momentum,
        fresh=fresh,
        weight_decay=weight_decay,
        nesterov=nesterov,
        ham_alpha=alpha,
        ham_beta=beta,
        correction=correction,
        gamma=gamma,
    )


@triton.jit
def _number(number_or_address):
    number = number_or_address
    if number.dtype.is_ptr():
        number = tl.load(number)
    return number


@triton.jit
def _correction_factor(fan_in, shape, correction):
    """c_i of each row."""
    divisor = tl.where(correction == 1, tl.load(shape.mean_fan_in), shape.columns.to(tl.float32))
    # Where a layer is empty, there is nothing that the factor is for.
    factor = tl.sqrt_rn(tl.div_rn(fan_in.to(tl.float32), tl.where(divisor == 0, 1.0, divisor)))
    return tl.where(correction == 0, 1.0, factor)
