"""Every backend against the float64 oracle."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from backends import INTERPRETED, NATIVE_ISAS, Backend
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import Hyper
from rules import DTYPES, EVERYTHING, FLOATS, RULES
from side_by_side import PATTERNS, SideBySide, Spec

from sparseopt_kernels.kernels.contract import NormOver

MOMENTA: dict[str, dict[str, Any]] = {
    "no-momentum": {},
    "dampening-only": {"dampening": 0.3},
    "momentum": {"momentum": 0.9},
    "dampened": {"momentum": 0.9, "dampening": 0.3},
    "nesterov": {"momentum": 0.9, "nesterov": True},
}
HAMS: dict[str, dict[str, Any]] = {
    "no-ham": {},
    "alpha": {"ham_alpha": 2.0},
    "beta": {"ham_beta": 0.3},
    "alpha-beta": {"ham_alpha": 80.0, "ham_beta": 0.1},
}
REST: list[tuple[dict[str, Any], ...]] = list(
    itertools.product(
        [{}, {"weight_decay": 0.05}],
        [{}, {"maximize": True}],
        [{}, {"max_grad_norm": 0.5}, {"max_grad_norm": 1e6}],
    )
)


@pytest.mark.slow
@pytest.mark.parametrize("correction", ["layer", "unnormalized", "none"])
@pytest.mark.parametrize("ham", HAMS)
@pytest.mark.parametrize("momentum", MOMENTA)
def test_every_combination_of_hyperparameters(
    backend: Backend, momentum: str, ham: str, correction: str
) -> None:
    """The full product. Each test runs weight decay x maximize x norm limit, every other one with
    grad_scale. The instruction sets are one source, compiled for each: the slower ones take every fourth
    of the product, and so does what is slow, and the reference with scalars in tensors.
    """
    specs = [Spec((5, 19), "empty-rows"), Spec((4, 3), None)]
    rest = list(enumerate(REST))
    if backend.isa in NATIVE_ISAS[1:]:
        rest = rest[NATIVE_ISAS.index(backend.isa) :: 4]
    if backend.is_slow or backend.isa == "device":
        rest = rest[(len(momentum) + len(ham) + len(correction)) % 4 :: 4]
    for seed, (decay, maximize, limit) in rest:
        scaled = (seed + len(momentum) + len(ham) + len(correction)) % 2
        rule = Hyper(
            lr=0.1, correction=correction, **MOMENTA[momentum], **HAMS[ham], **decay, **maximize, **limit
        )
        SideBySide(backend, specs, [rule], seed=seed).run(8.0 if scaled else None)


if INTERPRETED:  # with smaller tiles: 300 columns are many of them
    COLUMNS = [1, 7, 8, 15, 17, 27, 64, 300]
else:
    COLUMNS = [1, 7, 8, 15, 16, 17, 27, 31, 64, 129, 1000, 4097, 5000]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_columns(backend: Backend, dtype: torch.dtype, rule: Hyper) -> None:
    """Every number of columns around the sizes of bytes, vectors and cache lines, in one optimizer."""
    specs = [Spec((3, columns), pattern, dtype) for columns in COLUMNS for pattern in ("half", "sparse90")]
    SideBySide(backend, specs, [rule], seed=1).run()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_sparsity_patterns(backend: Backend, pattern: str, dtype: torch.dtype) -> None:
    """Patterns for each loop of a kernel: dense, list of active blocks, tails, rows with nothing."""
    specs = [
        Spec((5, 259 if backend.is_slow else 1031), pattern, dtype),
        Spec((17, 48), pattern, dtype),
        Spec((2, 3, 3, 3), pattern, dtype),
    ]
    rules = [Hyper(lr=0.05, momentum=0.9, weight_decay=0.01, max_grad_norm=5.0)]
    SideBySide(backend, specs, rules, seed=2).run()


@pytest.mark.parametrize("dtype", DTYPES)
def test_density_that_changes_while_running(backend: Backend, dtype: torch.dtype) -> None:
    """From dense to one weight and back: a kernel must leave its list of blocks and come back to it."""
    run = SideBySide(backend, [Spec((4, 2051), "full", dtype)], [Hyper(lr=0.05, momentum=0.9)], seed=3)
    for pattern in ("full", "sparse99", "half", "single", "blocks", "empty", "tail", "sparse90", "full"):
        run.write_mask("layer0", run.new_mask("layer0", pattern))
        for _ in range(3):
            run.step()


SHAPES = {
    "scalar": (),
    "one": (1,),
    "vector": (7,),
    "long-vector": (4097,),
    "one-row": (1, 4097),
    "one-column": (4097, 1),
    "one-weight": (1, 1),
    "no-rows": (0, 5),
    "no-columns": (5, 0),
    "nothing": (0,),
    "conv1d": (7, 3, 5),
    "conv2d": (16, 27, 3, 3),
    "conv3d": (4, 2, 3, 3, 3),
    "conv2d-1x1": (33, 27, 1, 1),
}


@pytest.mark.parametrize("pattern", [None, "half", "full", "empty"], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(backend: Backend, shape: tuple[int, ...], pattern: str | None) -> None:
    if backend.is_slow:  # a program for every 128 rows
        shape = tuple(259 if size == 4097 else size for size in shape)
    specs = [Spec(shape, pattern, dtype) for dtype in FLOATS]
    SideBySide(backend, specs, [replace(EVERYTHING, max_grad_norm=None)], seed=4).run()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_norm_of_one_parameter_alone(backend: Backend, shape: tuple[int, ...]) -> None:
    """The norm of an empty tensor, and of one whose mask is empty, is 0: no division by it."""
    for pattern in (None, "half", "empty"):
        SideBySide(backend, [Spec(shape, pattern)], [EVERYTHING], seed=4).run()


@pytest.mark.parametrize("correction", ["layer", "unnormalized", "none"])
@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("kernel", [(3,), (3, 2), (2, 1, 3), (4, 4)], ids=["1d", "2d", "3d", "a block"])
def test_conv_transpose(backend: Backend, kernel: tuple[int, ...], groups: int, correction: str) -> None:
    """Neurons of a ConvTranspose lie along dimension 1, group by group."""
    specs = [
        Spec((2 * groups, 5, *kernel), "half", torch.float32, transposed_groups=groups),
        Spec((2 * groups, 5, *kernel), "ramp", torch.float64, transposed_groups=groups),
        Spec((4, 6), "half", torch.float32),
    ]
    rule = Hyper(lr=0.1, momentum=0.9, correction=correction, weight_decay=0.01, max_grad_norm=2.0)
    SideBySide(backend, specs, [rule], seed=5).run()


def test_conv_transpose_in_a_plain_dict_counts_dimension_0(backend: Backend) -> None:
    """A plain mapping knows no module: documented to take dimension 0."""
    run = SideBySide(backend, [Spec((6, 5, 3, 3), "half")], [Hyper(lr=0.1, momentum=0.9)], seed=5)
    run.run()


@pytest.mark.parametrize("through_model", [False, True], ids=["dict", "Masks"])
def test_all_dtypes_and_groups_in_one_optimizer(backend: Backend, through_model: bool) -> None:
    """One batch per dtype, hyperparameters per group, one gradient norm over all of them."""
    specs = [
        Spec((5, 33), pattern, dtype)
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
        for pattern in ("half", None, "sparse90")
    ]
    rules = [
        Hyper(lr=0.1, momentum=0.9, max_grad_norm=1.0),
        Hyper(lr=0.02, weight_decay=0.1, correction="unnormalized", ham_alpha=3.0, max_grad_norm=4.0),
        Hyper(lr=0.3, momentum=0.5, nesterov=True, maximize=True, correction="none"),
        Hyper(lr=0.01, momentum=0.9, dampening=0.5, ham_beta=0.2, max_grad_norm=0.1),
        Hyper(lr=0.0),
    ]
    SideBySide(backend, specs, rules, seed=6, through_model=through_model).run(grad_scale=4.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_that_come_and_go(backend: Backend, dtype: torch.dtype) -> None:
    """The first step is each parameter's own, and a parameter without a gradient is left as it is."""
    specs = [Spec((4, 37), "half", dtype), Spec((4, 37), None, dtype), Spec((9,), None, dtype)]
    rule = Hyper(lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.01, max_grad_norm=3.0)
    run = SideBySide(backend, specs, [rule], seed=7)
    present = [
        [],
        ["layer0"],
        ["layer0", "layer2"],
        ["layer1"],
        ["layer0", "layer1", "layer2"],
        ["layer2"],
        [],
    ]
    for t in range(21):
        if t % 4 == 3:
            run.write_mask("layer0", run.new_mask("layer0"))
        grads = run.random_grads()
        run.step({name: grads[name] for name in present[t % len(present)]})


def test_amp_overflows_between_steps(backend: Backend) -> None:
    """found_inf set, on the first step too: nothing changes, and the next step is still the first."""
    specs = [Spec((4, 37), "half", torch.float32), Spec((5,), None, torch.float32)]
    run = SideBySide(backend, specs, [Hyper(lr=0.1, momentum=0.9, dampening=0.5)], seed=8)
    for found_inf in [1.0, 2.0, 0.0, 0.0, 1.0, 0.0, 8.0, 0.0] * 3:
        grads = run.random_grads(1024.0)
        if found_inf:
            grads["layer0"][1, 2] = math.inf
        run.step(grads, grad_scale=1024.0, found_inf=found_inf)
        if not backend.on_device:
            assert (run.steps > 2) == bool(run.optimizer.state)


def test_hyperparameters_that_change_while_running(backend: Backend) -> None:
    """A scheduler writes into the groups: the next step takes what is there."""
    specs = [Spec((4, 37), "half"), Spec((3, 5), None)]
    start = Hyper(lr=0.1)
    run = SideBySide(backend, specs, [start], seed=9)
    changes: list[dict[str, Any]] = [
        {"momentum": 0.9},
        {"lr": 0.0},
        {"lr": 0.2, "nesterov": True},
        {"correction": "none"},
        {"momentum": 0.0, "nesterov": False},
        {"maximize": True, "max_grad_norm": 1.0},
        {"momentum": 0.5, "dampening": 0.25},
        {"ham_alpha": 2.0, "weight_decay": 0.3},
        {"correction": "unnormalized", "max_grad_norm": None},
        {"correction": "layer", "ham_alpha": 0.0},
    ]
    rule = start
    for change in changes:
        rule = Hyper(**{**rule.__dict__, **change})
        run.optimizer.param_groups[0].update(change)
        run.oracle.groups = [(rule, layers) for _, layers in run.oracle.groups]
        for _ in range(2):
            run.step()


shapes = st.one_of(
    st.tuples(st.integers(1, 9), st.integers(1, 5000)),
    st.tuples(st.integers(1, 70), st.integers(1, 40)),
    st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(0, 300)),
    st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2)),
    st.just(()),
)
specs = st.builds(
    Spec,
    shapes,
    st.one_of(st.none(), st.sampled_from(PATTERNS)),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
unit = st.floats(0.0, 1.0)


@st.composite
def rules(draw: st.DrawFn) -> Hyper:
    momentum = draw(st.one_of(st.just(0.0), unit))
    dampening = draw(st.one_of(st.just(0.0), unit))
    return Hyper(
        lr=draw(unit) * 0.3,
        momentum=momentum,
        dampening=dampening,
        weight_decay=draw(st.one_of(st.just(0.0), unit)) * 0.1,
        nesterov=draw(st.booleans()) and momentum > 0 and dampening == 0,
        maximize=draw(st.booleans()),
        correction=draw(st.sampled_from(["layer", "unnormalized", "none"])),
        ham_alpha=draw(st.one_of(st.just(0.0), st.floats(0.0, 4.0))),
        ham_beta=draw(st.one_of(st.just(0.0), unit)),
        max_grad_norm=draw(st.one_of(st.none(), st.floats(0.01, 100.0))),
    )


@settings(
    max_examples=12 if INTERPRETED else 60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    specs=st.lists(specs, min_size=1, max_size=4),
    rules=st.lists(rules(), min_size=1, max_size=3),
    grad_scale=st.sampled_from([None, 0.5, 4.0]),
    threads=st.sampled_from([1, 2, 3]),
    norm_over=st.sampled_from(["active", "dense"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_anything(
    backend: Backend,
    specs: list[Spec],
    rules: list[Hyper],
    grad_scale: float | None,
    threads: int,
    norm_over: NormOver,
    seed: int,
) -> None:
    rules = rules[: len(specs)]
    run = SideBySide(backend, specs, rules, seed=seed, threads=threads, norm_over=norm_over)
    run.run(grad_scale)


@pytest.mark.slow
def test_large_layers(backend: Backend) -> None:
    """Large enough that threads share the work; 20 steps, so that a race has a chance."""
    specs = [
        Spec((19, 4097), "sparse90", torch.float32),
        Spec((19, 4097), "half", torch.float32),
        Spec((1501, 27), "sparse99", torch.float32),
        Spec((70_003,), None, torch.float32),
    ]
    SideBySide(backend, specs, [Hyper(lr=0.1, momentum=0.9, weight_decay=1e-3)], seed=10, threads=2).run()
