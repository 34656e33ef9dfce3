"""What runs on the GPU: the update rule and the gradient norm, as Triton kernels over many tensors.

A mask byte covers eight weights: 32 bytes of float32, one sector of memory. It is the predicate of every
access, constant along the eight, so that accesses stay vectors of 16 bytes: a predicate per element would
break each into scalar ones. Nothing here is particular to NVIDIA.

``table`` has a row of TABLE_WIDTH int64 per tensor (see ``triton_plan.BatchPlan``), ``grads`` the addresses
of the gradients, ``owner`` the tensor of each program, ``flags`` are those of ``Batch``, ``rules`` is a tuple
of numbers per parameter group (``triton._rule``). TYPE is what weights are stored as; all arithmetic is
float32.
"""

# What Triton compiles has no annotations but its own.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from sparseopt_kernels.kernels import triton_plan

TABLE_WIDTH = tl.constexpr(triton_plan.TABLE_WIDTH)


@triton.jit
def masked_step(
    table, grads, owner, flags, found_inf, grad_scale, rules,
    TYPE: tl.constexpr, ALIGNED: tl.constexpr, MOMENTUM: tl.constexpr, HAM: tl.constexpr,
    ROWS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """Updates ROWS neurons per program, a tile of BYTES mask bytes (8 * BYTES weights) of each at a time."""
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    t = tl.load(owner + tl.program_id(0))
    p, b, g = _memory(table, grads, t, TYPE, ALIGNED)
    bits, mean_fan_in, rows, columns, first_program, position, group, ham = _shape(table, t, TYPE, ALIGNED)
    row = (tl.program_id(0) - first_program) * ROWS + tl.arange(0, ROWS)
    row_bytes = tl.cdiv(columns, 8)
    inside = (row < rows)[:, None]
    bits += (row * row_bytes)[:, None]
    tiles = tl.cdiv(row_bytes, BYTES)
    byte, fan_in = _count(bits, tiles, row_bytes, inside, ROWS, BYTES)
    rule = _rule(rules, group, grad_scale)
    scale = (_correction_factor(fan_in, mean_fan_in, columns, rule) * rule[8])[:, None, None]
    first_step = tl.load(flags + 2 * position) != 0
    stale = tl.where(inside, tl.load(flags + 2 * position + 1), 0.0) != 0
    # Backwards: the bytes of the last tile are at hand, so those of a row of one tile are loaded once.
    for i in range(0, tiles):
        tile = tiles - 1 - i
        column, active = _columns(tile, byte, BYTES)
        live = ((byte != 0) | stale)[:, :, None] & (column < columns)
        e = (row * columns)[:, None, None] + column
        _update(p + e, b + e, g + e, active, live, scale, rule, first_step, ham, TYPE, MOMENTUM, HAM)
        byte = _mask_bytes(bits, tile - 1, row_bytes, inside, BYTES)


@triton.jit
def dense_step(
    table, grads, owner, flags, found_inf, grad_scale, rules,
    TYPE: tl.constexpr, ALIGNED: tl.constexpr, MOMENTUM: tl.constexpr, HAM: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """Updates SIZE weights of a tensor without a mask per program."""
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    t = tl.load(owner + tl.program_id(0))
    p, b, g = _memory(table, grads, t, TYPE, ALIGNED)
    _, _, _, numel, first_program, position, group, ham = _shape(table, t, TYPE, ALIGNED)
    e = (tl.program_id(0) - first_program) * SIZE + tl.arange(0, SIZE)
    rule = _rule(rules, group, grad_scale)
    first_step = tl.load(flags + 2 * position) != 0
    _update(p + e, b + e, g + e, e < numel, e < numel, rule[8], rule, first_step, ham, TYPE, MOMENTUM, HAM)


@triton.jit
def _update(
    p_at, b_at, g_at, active, live, scale, rule, first_step, ham,
    TYPE: tl.constexpr, MOMENTUM: tl.constexpr, HAM: tl.constexpr,
):  # fmt: skip
    """The update rule where ``live``; zero where not ``active``. Operations are those of update_rule.h."""
    lr, momentum, fresh, weight_decay, nesterov, alpha, beta, _, _ = rule
    p = tl.load(p_at, mask=live, other=0.0).to(tl.float32)
    g = tl.load(g_at, mask=live, other=0.0).to(tl.float32) * scale
    # Without weight decay an infinite weight stays one: 0 * inf would make it NaN.
    d = tl.where(weight_decay == 0, g, tl.fma(p, weight_decay, g))
    u = d
    if MOMENTUM:
        b = tl.load(b_at, mask=live, other=0.0).to(tl.float32)
        b = tl.fma(d, tl.where(first_step, 1.0, fresh), b * momentum)
        u = tl.where(nesterov != 0, tl.fma(b, momentum, d), b)
        tl.store(b_at, tl.where(active, b, 0.0).to(TYPE), mask=live)
    p = tl.fma(u, -lr, p)
    if HAM:
        sign = (p > 0).to(tl.float32) - (p < 0).to(tl.float32)
        exponent = -lr * tl.fma(sign * alpha, g, beta)
        exponent = tl.where(exponent < -5.0, -5.0, tl.where(exponent > 5.0, 5.0, exponent))
        p = tl.where((ham != 0) & ((alpha != 0) | (beta != 0)), p * tl.exp(exponent), p)
    tl.store(p_at, tl.where(active, p, 0.0).to(TYPE), mask=live)


@triton.jit
def masked_squares(
    table, grads, owner, rules, sums,
    TYPE: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """Each program's sum of ``(c_i g)^2`` over its active weights, and that sum's rounding error."""
    t = tl.load(owner + tl.program_id(0))
    _, _, g_at = _memory(table, grads, t, TYPE, ALIGNED)
    bits, mean_fan_in, rows, columns, first_program, _, group, _ = _shape(table, t, TYPE, ALIGNED)
    row = (tl.program_id(0) - first_program) * ROWS + tl.arange(0, ROWS)
    row_bytes = tl.cdiv(columns, 8)
    inside = (row < rows)[:, None]
    bits += (row * row_bytes)[:, None]
    tiles = tl.cdiv(row_bytes, BYTES)
    byte, fan_in = _count(bits, tiles, row_bytes, inside, ROWS, BYTES)
    scale = _correction_factor(fan_in, mean_fan_in, columns, _rule(rules, group, None))[:, None, None]
    total, error = 0.0, 0.0
    for i in range(0, tiles):
        tile = tiles - 1 - i
        column, active = _columns(tile, byte, BYTES)
        live = (byte != 0)[:, :, None] & (column < columns)
        g = tl.load(g_at + (row * columns)[:, None, None] + column, mask=live, other=0.0).to(tl.float32)
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
    _, _, g_at = _memory(table, grads, t, TYPE, ALIGNED)
    _, _, _, numel, first_program, _, _, _ = _shape(table, t, TYPE, ALIGNED)
    e = (tl.program_id(0) - first_program) * SIZE + tl.arange(0, SIZE)
    g = tl.load(g_at + e, mask=e < numel, other=0.0).to(tl.float32)
    tl.store(sums + 2 * tl.program_id(0), tl.sum(g * g))
    tl.store(sums + 2 * tl.program_id(0) + 1, 0.0)


@triton.jit
def _memory(table, grads, t, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The addresses of a tensor's parameter, momentum buffer and gradient."""
    p = tl.load(table + t * TABLE_WIDTH).to(tl.pointer_type(TYPE))
    b = tl.load(table + t * TABLE_WIDTH + 1).to(tl.pointer_type(TYPE))
    g = tl.load(grads + t).to(tl.pointer_type(TYPE))
    if ALIGNED:
        p, b, g = tl.multiple_of(p, 16), tl.multiple_of(b, 16), tl.multiple_of(g, 16)
    return p, b, g


@triton.jit
def _shape(table, t, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The rest of a table's row."""
    row = table + t * TABLE_WIDTH
    bits = tl.load(row + 2).to(tl.pointer_type(tl.uint8))
    mean_fan_in = tl.load(row + 3).to(tl.pointer_type(tl.float32))
    columns = tl.load(row + 5)
    if ALIGNED:  # rows, and a dense tensor, are whole numbers of 16 bytes
        columns = tl.multiple_of(columns, 128 // TYPE.primitive_bitwidth)
    return (bits, mean_fan_in, tl.load(row + 4), columns,
            tl.load(row + 6), tl.load(row + 7), tl.load(row + 8), tl.load(row + 9))  # fmt: skip


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
    """The rule of a group: (lr, momentum, 1 - dampening, weight_decay, nesterov, ham_alpha,
    ham_beta, correction, gamma). Gamma has the sign of ``maximize`` and AMP's scale in it."""
    lr, gamma = _number(rules[0][0]), _number(rules[0][9]) * rules[0][8]
    momentum, fresh, weight_decay, nesterov = rules[0][1], rules[0][2], rules[0][3], rules[0][4]
    alpha, beta, correction = rules[0][5], rules[0][6], rules[0][7]
    for k in tl.static_range(1, len(rules)):
        is_it = group == k
        lr = tl.where(is_it, _number(rules[k][0]), lr)
        momentum = tl.where(is_it, rules[k][1], momentum)
        fresh = tl.where(is_it, rules[k][2], fresh)
        weight_decay = tl.where(is_it, rules[k][3], weight_decay)
        nesterov = tl.where(is_it, rules[k][4], nesterov)
        alpha = tl.where(is_it, rules[k][5], alpha)
        beta = tl.where(is_it, rules[k][6], beta)
        correction = tl.where(is_it, rules[k][7], correction)
        gamma = tl.where(is_it, _number(rules[k][9]) * rules[k][8], gamma)
    if grad_scale is not None:
        gamma = tl.div_rn(gamma, tl.load(grad_scale))
    return lr, momentum, fresh, weight_decay, nesterov, alpha, beta, correction, gamma


@triton.jit
def _number(number_or_address):
    number = number_or_address
    if number.dtype.is_ptr():
        number = tl.load(number)
    return number


@triton.jit
def _correction_factor(fan_in, mean_fan_in, columns, rule):
    """c_i of each row: rule[7] is 0 for "none", 1 for "layer" (Eq. 12), 2 for "unnormalized"."""
    divisor = tl.where(rule[7] == 1, tl.load(mean_fan_in), columns.to(tl.float32))
    # Where a layer is empty, there is nothing that the factor is for.
    factor = tl.sqrt_rn(tl.div_rn(fan_in.to(tl.float32), tl.where(divisor == 0, 1.0, divisor)))
    return tl.where(rule[7] == 0, 1.0, factor)
