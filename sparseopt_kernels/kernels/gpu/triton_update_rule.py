"""The update rule as Triton functions: what ``csrc/update_rule.h`` is for the CPU and for CUDA.

No memory is touched here but the numbers that only the device knows. All arithmetic is float32.
"""

# What Triton compiles has no annotations but its own.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Weights(NamedTuple):
    """Weights with what belongs to them, as float32."""

    p: Any
    b: Any
    g: Any


class Rule(NamedTuple):
    """A rule as numbers. Gamma has the sign of ``maximize`` and AMP's scale in it."""

    lr: Any
    momentum: Any
    one_minus_dampening: Any  # 1 - dampening
    weight_decay: Any
    nesterov: Any
    ham_alpha: Any
    ham_beta: Any
    gamma: Any


@triton.jit
def correction_factor(fan_in, divisor):
    """Return c_i of ``correction.correction_factors``."""
    return tl.sqrt_rn(tl.div_rn(fan_in, divisor))


@triton.jit
def update_weights(weights, scale, rule, has_b, ham, MOMENTUM: tl.constexpr, HAM: tl.constexpr):
    """The update rule. Operations are those of update_rule.h."""
    p, b, g = weights.p, weights.b, weights.g * scale
    # Without weight decay an infinite weight stays one: 0 * inf would make it NaN.
    d = tl.where(rule.weight_decay == 0, g, tl.fma(p, rule.weight_decay, g))
    u = d
    if MOMENTUM:
        b = tl.fma(d, rule.one_minus_dampening, b * rule.momentum)
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
def rule_of(rules, index, numbers, grad_scale):
    """Return the rule with that index."""
    lr, gamma = _numbers(rules[0], numbers)
    momentum, one_minus_dampening, weight_decay = (
        rules[0].momentum,
        rules[0].one_minus_dampening,
        rules[0].weight_decay,
    )
    nesterov = rules[0].nesterov
    alpha, beta = rules[0].ham_alpha, rules[0].ham_beta
    for k in tl.static_range(1, len(rules)):
        is_it = index == k
        own_lr, own_gamma = _numbers(rules[k], numbers)
        lr = tl.where(is_it, own_lr, lr)
        gamma = tl.where(is_it, own_gamma, gamma)
        momentum = tl.where(is_it, rules[k].momentum, momentum)
        one_minus_dampening = tl.where(is_it, rules[k].one_minus_dampening, one_minus_dampening)
        weight_decay = tl.where(is_it, rules[k].weight_decay, weight_decay)
        nesterov = tl.where(is_it, rules[k].nesterov, nesterov)
        alpha = tl.where(is_it, rules[k].ham_alpha, alpha)
        beta = tl.where(is_it, rules[k].ham_beta, beta)
    if grad_scale != 0:
        gamma = tl.div_rn(gamma, tl.load(grad_scale.to(tl.pointer_type(tl.float32))))
    return Rule(
        lr=lr,
        momentum=momentum,
        one_minus_dampening=one_minus_dampening,
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
