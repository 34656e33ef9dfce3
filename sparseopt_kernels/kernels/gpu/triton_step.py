"""The update rule and the gradient norm, as Triton kernels over many tensors.

Memory is read in sectors of 32 bytes, so the mask bits of the LANES weights of a sector make the predicate of
their accesses. It is constant along them, so that accesses stay vectors of 16 bytes: a predicate per element
would break each into scalar ones. Nothing here is particular to NVIDIA.

``masked_step`` counts a neuron's fan-in from its mask and updates it, in one pass: for a mask that is new.
``walk_step`` walks what ``triton_lists`` has made of it, from the next step on: programs have equal work,
whatever the shapes.

Addresses (tables, owners, gradients, AMP's scalars, ``numbers``, ``sums``) are int64, 0 being none: Triton
would compile anew for None, and for pointers of another alignment. ``rules`` is a tuple of
``triton.RuleArgument``. TYPE is what weights are stored as; all arithmetic is float32.
"""

# What Triton compiles has no annotations but its own.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, valid-type"

from typing import Any, NamedTuple

import triton
import triton.language as tl

from sparseopt_kernels.kernels.gpu.tables import StepRow, WalkRow

_STEP_WIDTH = tl.constexpr(len(StepRow._fields))
_WALK_WIDTH = tl.constexpr(len(WalkRow._fields))


class Memory(NamedTuple):
    """The addresses of a tensor's parameter, momentum buffer and gradient; whether there is a buffer."""

    p: Any
    b: Any
    g: Any
    has_b: Any


class Weights(NamedTuple):
    """Weights with what belongs to them, as float32."""

    p: Any
    b: Any
    g: Any


class Rule(NamedTuple):
    """A rule as numbers. Gamma has the sign of ``maximize`` and AMP's scale in it."""

    lr: Any
    momentum: Any
    fresh: Any  # 1 - dampening
    weight_decay: Any
    nesterov: Any
    ham_alpha: Any
    ham_beta: Any
    gamma: Any


class Chunk(NamedTuple):
    """What a program walks at a time: sectors of one tensor, of which not all need be there, [SECTORS, 1]."""

    sector: Any  # their numbers
    active: Any  # the mask bits of their weights; 0 for what is not there
    is_last: Any  # whether it is the tensor's last one


class Factors(NamedTuple):
    """c_i of the weights of sectors, [SECTORS, 1]: one up to a column, another from there on."""

    until: Any
    first: Any
    second: Any


class Rest(NamedTuple):
    """The last weights of a tensor, less than 16 bytes, [1, LANES]."""

    e: Any
    active: Any
    live: Any
    c: Any


@triton.jit(do_not_specialize=["table", "grads", "owner", "found_inf", "grad_scale", "numbers"])
def masked_step(
    table: tl.int64, grads: tl.int64, owner: tl.int64, found_inf: tl.int64, grad_scale: tl.int64,
    numbers: tl.int64, rules,
    TYPE: tl.constexpr, ALIGNED: tl.constexpr, MOMENTUM: tl.constexpr, HAM: tl.constexpr,
    LANES: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """Updates ROWS neurons per program, UNITS times LANES weights of each at a time; their fan-in it counts
    in pieces of COUNTED weights."""
    if found_inf != 0:
        if tl.load(found_inf.to(tl.pointer_type(tl.float32))) != 0:
            return
    t = tl.load(owner.to(tl.pointer_type(tl.int32)) + tl.program_id(0))
    entry = _step_row(table, t)
    columns = entry.columns.to(tl.int32)
    mask = tl.multiple_of(entry.mask.to(tl.pointer_type(tl.int8)), 16)
    if ALIGNED:
        columns = tl.multiple_of(columns, LANES // 2)
    row = (tl.program_id(0) - entry.first_program.to(tl.int32)) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = row < entry.rows
    begin = row.to(tl.int64) * columns
    counted = tl.zeros([ROWS, COUNTED], tl.int32)
    for at in range(0, columns, COUNTED):
        column = at + tl.arange(0, COUNTED)[None, :]
        weights = tl.load(mask + begin + column, mask=inside & (column < columns), other=0)
        counted += (weights != 0).to(tl.int32)
    fan_in = tl.sum(counted, axis=1)[:, None].to(tl.float32)
    rule = _rule(rules, entry.rule, numbers, grad_scale)
    is_corrected = entry.divisor != 0
    divisor = tl.load(entry.divisor.to(tl.pointer_type(tl.float32)), mask=is_corrected, other=1.0)
    c = tl.where(is_corrected, correction_factor(fan_in, divisor), 1.0)
    scale = (c * rule.gamma)[:, :, None]

    to = _memory(entry.parameter, entry.momentum_buffer, grads, t, TYPE, ALIGNED, ALIGNED)
    begin, inside = begin[:, :, None], inside[:, :, None]
    to = Memory(p=to.p + begin, b=to.b + begin, g=to.g + begin, has_b=to.has_b)
    left, right = _unit_columns(LANES, UNITS)
    mask_left = _mask_of(mask + begin, left, columns, inside)
    mask_right = _mask_of(mask + begin, right, columns, inside)
    for _ in range(0, columns, LANES * UNITS):
        # The next masks are on their way while this tile is updated.
        next_left = _mask_of(mask + begin, left + LANES * UNITS, columns, inside)
        next_right = _mask_of(mask + begin, right + LANES * UNITS, columns, inside)
        active_left, active_right = mask_left != 0, mask_right != 0
        is_live = _any(active_left) | _any(active_right)
        live_left, live_right = is_live & (left < columns), is_live & (right < columns)
        first = _read(to, left, live_left, MOMENTUM)
        second = _read(to, right, live_right, MOMENTUM)
        first = _update(first, scale, rule, to.has_b, entry.ham != 0, MOMENTUM, HAM)
        second = _update(second, scale, rule, to.has_b, entry.ham != 0, MOMENTUM, HAM)
        _write(to, left, active_left, live_left, first, TYPE, MOMENTUM)
        _write(to, right, active_right, live_right, second, TYPE, MOMENTUM)
        left, right = left + LANES * UNITS, right + LANES * UNITS
        mask_left, mask_right = next_left, next_right


@triton.jit(do_not_specialize=["table", "grads", "owner", "chunks", "found_inf", "grad_scale", "numbers"])
def walk_step(
    table: tl.int64, grads: tl.int64, owner: tl.int64, chunks: tl.int64, found_inf: tl.int64,
    grad_scale: tl.int64, numbers: tl.int64, rules,
    TYPE: tl.constexpr, ALIGNED: tl.constexpr, GRADS_ALIGNED: tl.constexpr, WIDE: tl.constexpr,
    MOMENTUM: tl.constexpr, HAM: tl.constexpr, LANES: tl.constexpr, SECTORS: tl.constexpr,
):  # fmt: skip
    """Updates the live sectors of all tensors, SECTORS at a time."""
    if found_inf != 0:
        if tl.load(found_inf.to(tl.pointer_type(tl.float32))) != 0:
            return
    rule = _rule(rules, 0, numbers, grad_scale)
    count = _count(chunks)
    t, chunk = _chunk_of(table, owner, tl.program_id(0), count, 0, LANES, SECTORS)
    for number in range(tl.program_id(0), count, tl.num_programs(0)):
        entry = _walk_row(table, t)
        if len(rules) > 1:
            rule = _rule(rules, entry.rule, numbers, grad_scale)
        to = _memory(entry.parameter, entry.momentum_buffer, grads, t, TYPE, ALIGNED, GRADS_ALIGNED)
        e = _first_weights(chunk.sector, LANES, WIDE)
        end = _end(entry, ALIGNED, LANES, WIDE)
        left, right = _halves(LANES)
        live_left = (chunk.active != 0) & (e + left < end)
        live_right = (chunk.active != 0) & (e + right < end)
        # A thread has both halves of a sector, of 16 bytes. All is asked for before any is waited for, the
        # next chunk included.
        first = _read(to, e + left, live_left, MOMENTUM)
        second = _read(to, e + right, live_right, MOMENTUM)
        factors = _factors(entry, chunk, LANES, WIDE)
        next_t, following = _chunk_of(table, owner, number + tl.num_programs(0), count, t, LANES, SECTORS)
        c = _factor_at(entry, factors, e, left, ALIGNED, WIDE)
        first = _update(first, c * rule.gamma, rule, to.has_b, entry.ham != 0, MOMENTUM, HAM)
        c = _factor_at(entry, factors, e, right, ALIGNED, WIDE)
        second = _update(second, c * rule.gamma, rule, to.has_b, entry.ham != 0, MOMENTUM, HAM)
        _write(to, e + left, _bits(chunk.active, left), live_left, first, TYPE, MOMENTUM)
        _write(to, e + right, _bits(chunk.active, right), live_right, second, TYPE, MOMENTUM)
        if ALIGNED:
            if chunk.is_last & (end != entry.elements):
                rest = _rest(entry, end, LANES, WIDE)
                weights = _read(to, rest.e, rest.live, MOMENTUM)
                weights = _update(weights, rest.c * rule.gamma, rule, to.has_b, entry.ham != 0, MOMENTUM, HAM)
                _write(to, rest.e, rest.active, rest.live, weights, TYPE, MOMENTUM)
        t, chunk = next_t, following


@triton.jit(do_not_specialize=["table", "grads", "owner", "chunks", "sums"])
def walk_squares(
    table: tl.int64, grads: tl.int64, owner: tl.int64, chunks: tl.int64, sums: tl.int64,
    TYPE: tl.constexpr, ALIGNED: tl.constexpr, GRADS_ALIGNED: tl.constexpr, WIDE: tl.constexpr,
    LANES: tl.constexpr, SECTORS: tl.constexpr,
):  # fmt: skip
    """Write each program's sum of ``(c_i g)^2`` over its active weights, and the rounding error of that
    sum."""
    total, error = 0.0, 0.0
    for number in range(tl.program_id(0), _count(chunks), tl.num_programs(0)):
        t = tl.load(owner.to(tl.pointer_type(tl.int32)) + number)
        entry = _walk_row(table, t)
        to = _memory(entry.parameter, entry.momentum_buffer, grads, t, TYPE, ALIGNED, GRADS_ALIGNED)
        chunk = _chunk(entry, number, LANES, SECTORS)
        factors = _factors(entry, chunk, LANES, WIDE)
        e = _first_weights(chunk.sector, LANES, WIDE)
        end = _end(entry, ALIGNED, LANES, WIDE)
        left, right = _halves(LANES)
        c_left = _factor_at(entry, factors, e, left, ALIGNED, WIDE)
        c_right = _factor_at(entry, factors, e, right, ALIGNED, WIDE)
        is_live = chunk.active != 0
        squares = _squares(to, e + left, _bits(chunk.active, left), is_live & (e + left < end), c_left)
        squares += _squares(to, e + right, _bits(chunk.active, right), is_live & (e + right < end), c_right)
        square = tl.sum(squares)
        if ALIGNED:
            if chunk.is_last & (end != entry.elements):
                rest = _rest(entry, end, LANES, WIDE)
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
        b = tl.load(at.b + e, mask=_only_if(at.has_b, live), other=0.0).to(tl.float32)
    return Weights(p=p, b=b, g=g)


@triton.jit
def _write(at, e, active, live, weights, TYPE: tl.constexpr, MOMENTUM: tl.constexpr):
    """Zero is written where weights are not active."""
    if MOMENTUM:
        tl.store(at.b + e, tl.where(active, weights.b, 0.0).to(TYPE), mask=_only_if(at.has_b, live))
    tl.store(at.p + e, tl.where(active, weights.p, 0.0).to(TYPE), mask=live)


@triton.jit
def _update(weights, scale, rule, has_b, ham, MOMENTUM: tl.constexpr, HAM: tl.constexpr):
    """The update rule. Operations are those of update_rule.h."""
    p, b, g = weights.p, weights.b, weights.g * scale
    # Without weight decay an infinite weight stays one: 0 * inf would make it NaN.
    d = tl.where(rule.weight_decay == 0, g, tl.fma(p, rule.weight_decay, g))
    u = d
    if MOMENTUM:
        b = tl.fma(d, rule.fresh, b * rule.momentum)
        u = tl.where(has_b, tl.where(rule.nesterov != 0, tl.fma(b, rule.momentum, d), b), d)
    p = tl.fma(u, -rule.lr, p)
    if HAM:
        sign = (p > 0).to(tl.float32) - (p < 0).to(tl.float32)
        exponent = -rule.lr * tl.fma(sign * rule.ham_alpha, g, rule.ham_beta)
        exponent = tl.where(exponent < -5.0, -5.0, tl.where(exponent > 5.0, 5.0, exponent))
        wanted = ham & ((rule.ham_alpha != 0) | (rule.ham_beta != 0))
        p = tl.where(wanted, p * tl.exp(exponent), p)
    return Weights(p=p, b=b, g=g)


@triton.jit
def _squares(at, e, active, live, c):
    g = tl.load(at.g + e, mask=live, other=0.0).to(tl.float32)
    g = tl.where(active, g * c, 0.0)
    return g * g


@triton.jit
def _unit_columns(LANES: tl.constexpr, UNITS: tl.constexpr):
    """The columns of a row's first UNITS, in two halves, [1, UNITS, LANES / 2]."""
    half: tl.constexpr = LANES // 2
    left = tl.arange(0, UNITS)[None, :, None] * LANES + tl.arange(0, half)[None, None, :]
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
def _walk_row(table, t):
    at = table.to(tl.pointer_type(tl.int64)) + t * _WALK_WIDTH
    return WalkRow(
        parameter=tl.load(at),
        momentum_buffer=tl.load(at + 1),
        masks=tl.load(at + 2),
        listed=tl.load(at + 3),
        bits=tl.load(at + 4),
        factors=tl.load(at + 5),
        columns=tl.load(at + 6),
        elements=tl.load(at + 7),
        rule=tl.load(at + 8),
        ham=tl.load(at + 9),
        first_chunk=tl.load(at + 10),
        length=tl.load(at + 11),
    )


@triton.jit
def _count(chunks):
    return tl.load(chunks.to(tl.pointer_type(tl.int64))).to(tl.int32)


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


@triton.jit
def _chunk_of(table, owner, number, count, otherwise, LANES: tl.constexpr, SECTORS: tl.constexpr):
    """Whose chunk it is, and what is in it; ``otherwise`` and nothing where there are not so many."""
    t = tl.load(owner.to(tl.pointer_type(tl.int32)) + number, mask=number < count, other=otherwise)
    return t, _chunk(_walk_row(table, t), number, LANES, SECTORS)


@triton.jit
def _chunk(entry, number, LANES: tl.constexpr, SECTORS: tl.constexpr):
    first = (number - entry.first_chunk.to(tl.int32)) * SECTORS
    length = entry.length.to(tl.int32)
    i = first + tl.arange(0, SECTORS)[:, None]
    there = i < length
    is_listed = entry.listed != 0
    numbers = entry.listed.to(tl.pointer_type(tl.int32))
    listed = tl.load(numbers + i, mask=_only_if(is_listed, there), other=0)
    has_bits = _only_if(entry.bits != 0, there)
    active = tl.load(_bits_at(entry.bits, LANES) + i, mask=has_bits, other=0).to(tl.int32)
    active = tl.where(_only_if(entry.bits == 0, there), (1 << LANES) - 1, active)
    return Chunk(sector=tl.where(is_listed, listed, i), active=active, is_last=first + SECTORS >= length)


@triton.jit
def _only_if(wanted, live):
    """``live`` if ``wanted``, which is one for all: their ``&`` is no boolean in Triton 3.9's interpreter."""
    return tl.where(wanted, live, False)


@triton.jit
def _bits_at(address, LANES: tl.constexpr):
    if LANES == 8:
        return address.to(tl.pointer_type(tl.uint8))
    else:
        return address.to(tl.pointer_type(tl.uint16))


@triton.jit
def _bits(active, lane):
    return ((active >> lane) & 1) != 0


@triton.jit
def _halves(LANES: tl.constexpr):
    """The weights of a sector in two halves of 16 bytes, [1, LANES / 2]."""
    half: tl.constexpr = LANES // 2
    left = tl.arange(0, half)[None, :]
    return left, left + half


@triton.jit
def _first_weights(sector, LANES: tl.constexpr, WIDE: tl.constexpr):
    """The first weight of each sector: as int64 only where there are so many."""
    if WIDE:
        return sector.to(tl.int64) * LANES
    else:
        return sector.to(tl.int32) * LANES


@triton.jit
def _end(entry, ALIGNED: tl.constexpr, LANES: tl.constexpr, WIDE: tl.constexpr):
    """Where what is accessed by vectors ends."""
    end = entry.elements
    if not WIDE:
        end = end.to(tl.int32)
    if ALIGNED:
        end = end // (LANES // 2) * (LANES // 2)
    return end


@triton.jit
def _factors(entry, chunk, LANES: tl.constexpr, WIDE: tl.constexpr):
    """Return c_i of the rows in which sectors begin and end, if these are one or two."""
    columns, elements = entry.columns, entry.elements
    if not WIDE:
        columns, elements = columns.to(tl.uint32), elements.to(tl.uint32)
    begin = _first_weights(chunk.sector, LANES, WIDE).to(columns.dtype)
    row = begin // columns
    until = columns - (begin - row * columns)
    needed = _only_if(entry.factors != 0, chunk.active != 0)
    crossed = needed & (until < LANES) & (begin + until < elements)
    at = entry.factors.to(tl.pointer_type(tl.float32)) + row.to(tl.int64)
    first = tl.load(at, mask=needed, other=1.0)
    second = tl.load(at + 1, mask=crossed, other=1.0)
    return Factors(until=until.to(tl.int32), first=first, second=second)


@triton.jit
def _factor_at(entry, factors, e, lane, ALIGNED: tl.constexpr, WIDE: tl.constexpr):
    """Return c_i of the weights ``lane`` of sectors that begin with ``e``."""
    c = tl.where(lane < factors.until, factors.first, factors.second)
    if not ALIGNED:
        if entry.columns < 2 * lane.shape[1]:  # there may be more rows in a sector than two
            c = _factor_of(entry, e + lane, WIDE)
    return c


@triton.jit
def _factor_of(entry, e, WIDE: tl.constexpr):
    """Return c_i of weights; 1 for places behind the end of the tensor."""
    columns, elements = entry.columns, entry.elements
    if not WIDE:
        columns, elements = columns.to(tl.uint32), elements.to(tl.uint32)
    row = (e.to(columns.dtype) // columns).to(tl.int64)
    at = entry.factors.to(tl.pointer_type(tl.float32)) + row
    needed = _only_if(entry.factors != 0, e.to(columns.dtype) < elements)
    return tl.load(at, mask=needed, other=1.0)


@triton.jit
def _rest(entry, begin, LANES: tl.constexpr, WIDE: tl.constexpr):
    """The last weights of a tensor, from ``begin`` on."""
    sector = tl.zeros([1, 1], tl.int64) + (entry.elements - 1) // LANES
    has_mask = _only_if(entry.masks != 0, sector >= 0)
    bits = tl.load(_bits_at(entry.masks, LANES) + sector, mask=has_mask, other=0).to(tl.int32)
    bits = tl.where(entry.masks == 0, (1 << LANES) - 1, bits)
    lane = tl.arange(0, LANES)[None, :]
    e = _first_weights(sector, LANES, WIDE) + lane
    live = (bits != 0) & (e >= begin) & (e < entry.elements)
    return Rest(e=e, active=_bits(bits, lane), live=live, c=_factor_of(entry, e, WIDE))


@triton.jit
def correction_factor(fan_in, divisor):
    """Return c_i of ``correction.correction_factors``."""
    return tl.sqrt_rn(tl.div_rn(fan_in, divisor))


@triton.jit
def _rule(rules, index, numbers, grad_scale):
    """Return the rule with that index."""
    lr, gamma = _numbers(rules[0], numbers)
    momentum, fresh, weight_decay = rules[0].momentum, rules[0].fresh, rules[0].weight_decay
    nesterov = rules[0].nesterov
    alpha, beta = rules[0].ham_alpha, rules[0].ham_beta
    for k in tl.static_range(1, len(rules)):
        is_it = index == k
        own_lr, own_gamma = _numbers(rules[k], numbers)
        lr = tl.where(is_it, own_lr, lr)
        gamma = tl.where(is_it, own_gamma, gamma)
        momentum = tl.where(is_it, rules[k].momentum, momentum)
        fresh = tl.where(is_it, rules[k].fresh, fresh)
        weight_decay = tl.where(is_it, rules[k].weight_decay, weight_decay)
        nesterov = tl.where(is_it, rules[k].nesterov, nesterov)
        alpha = tl.where(is_it, rules[k].ham_alpha, alpha)
        beta = tl.where(is_it, rules[k].ham_beta, beta)
    if grad_scale != 0:
        gamma = tl.div_rn(gamma, tl.load(grad_scale.to(tl.pointer_type(tl.float32))))
    return Rule(
        lr=lr,
        momentum=momentum,
        fresh=fresh,
        weight_decay=weight_decay,
        nesterov=nesterov,
        ham_alpha=alpha,
        ham_beta=beta,
        gamma=gamma,
    )


@triton.jit
def _numbers(rule, numbers):
    """Learning rate and gamma, from memory where the host does not know them."""
    lr, gamma = rule.lr, rule.gamma
    if numbers != 0:
        own = numbers.to(tl.pointer_type(tl.float32))
        lr = tl.load(own + tl.cast(rule.lr_place, tl.int32), mask=rule.lr_place >= 0, other=lr)
        gamma = tl.load(own + tl.cast(rule.gamma_place, tl.int32), mask=rule.gamma_place >= 0, other=gamma)
    return lr, gamma * rule.sign
