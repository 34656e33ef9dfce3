"""How exact the norm of gradients is. Programs add up squares in float32, together with what each addition
loses, and the total of both is float64. What is squared was rounded to float32; here, the same number is
squared in float64.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest
import torch
from built_once import load
from cuda_on_cpu.build import compiler, fuses_multiply_adds
from cuda_on_cpu.calls import Hyper, Weight, inputs_of, loaded, plan_of
from cuda_on_cpu.mistakes import make_mistake
from noted_launches import Launches
from parameters import parameters_and_masks
from triton_mutants import substitute

from sparseopt_kernels.correction import Correction
from sparseopt_kernels.kernels.contract import Inputs
from sparseopt_kernels.kernels.gpu import triton as triton_backend
from sparseopt_kernels.kernels.gpu.plan import GpuPlan
from sparseopt_kernels.kernels.gpu.triton import TritonKernels
from sparseopt_kernels.kernels.tensor_memory import addresses_of
from sparseopt_kernels.optimizer import SparseOpt


def bound(additions: int) -> float:
    """How far a sum of squares may be off, relatively, that is made by so many additions of pairs.

    The high parts lose nothing that the low parts do not get: of n additions, n roundings of the sum, and of
    each square one, which makes n + 1 of the whole sum. In float32, the low part is rounded n + 1 times on
    the way.
    """
    return ((additions + 1) * 2.0**-24) ** 2


# ---- sums of programs -------------------------------------------------------------------------------


@pytest.mark.parametrize("others", [0, 1], ids=["a launch", "two launches"])
def test_sums_of_programs_are_added_in_float64(
    launches: Launches, others: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a launch, and of several: float32 would forget the small ones."""
    parts = torch.tensor([[1.0, 2.0**-26], [2.0**-30, 0.0]])
    monkeypatch.setattr(TritonKernels, "sector_squares", lambda self, launch, gradients: parts)
    parameters, masks = parameters_and_masks([(4, 64)] * (1 + others))
    for p in parameters[1:]:  # are not aligned
        p.data = torch.zeros(4 * 64 + 1)[1:].view(4, 64)
    optimizer = SparseOpt(parameters, masks=masks, backend="triton")
    optimizer.step()
    plan = optimizer._prepared.batches[0].plan
    assert isinstance(plan, GpuPlan)
    gradients = [p.grad for p in parameters if p.grad is not None]
    found = plan.squared_norm(
        Inputs(gradients, addresses_of(gradients), [Hyper().rule()], None, None), "active"
    )
    assert found.dtype == torch.float64
    assert float(found) == (1 + others) * (1 + 2.0**-26 + 2.0**-30)


# ---- CUDA -------------------------------------------------------------------------------------------

needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
BLOCKS = 4  # of one multiprocessor, as the CPU is one


def equal_gradients(columns: int) -> list[Weight]:
    """All rounding errors have one sign then: none makes up for another."""
    weight = Weight(rows=64, columns=columns, density=None)
    weight.g.fill_(1.1)
    return [weight]


def many_gradients(correction: Correction) -> list[Weight]:
    weights = [Weight("float32", 30, 700), Weight("bfloat16", 23, 4100), Weight("float16", 9, 999, None)]
    for weight in weights:
        weight.correction = correction
    return weights


def check_cuda(weights: list[Weight]) -> None:
    for weight in weights:  # a dtype each
        plan = plan_of([weight], by_sectors=True)
        factors = plan._factors[0]
        c = torch.ones(weight.rows, 1) if factors is None else factors.c.float()[:, None]
        squared = (c * weight.g.float())[weight.mask].double()
        expected = math.fsum(squared.square().tolist())
        found = float(plan.squared_norm(inputs_of([weight], [Hyper().rule()]), "active"))
        # Squares of a thread, one after another, then sums over lanes and warps.
        sectors = -(-weight.g.nbytes // 32)
        additions = -(-sectors // (256 * BLOCKS)) * (32 // weight.g.itemsize) + 5 + 7
        assert found == pytest.approx(expected, rel=bound(additions), abs=0.0)


def check_everything() -> None:
    if not fuses_multiply_adds():
        pytest.skip(
            "the compiler is told of a CPU that does not fuse multiply-adds: an error of a square is 0"
        )
    for columns in (100, 1000):
        check_cuda(equal_gradients(columns))
    for correction in ("layer", "none"):
        check_cuda(many_gradients(correction))


@needs_compiler
def test_the_cuda_norm_is_a_sum_of_pairs(cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded(cuda, monkeypatch)
    check_everything()


@needs_compiler
@pytest.mark.parametrize(
    "mistake",
    [
        None,
        "the error of a square",
        "the error of a square in two roundings",
        "the error of a sum",
        "errors of other lanes",
        "errors of other warps",
        "errors that are not written",
    ],
)
def test_a_less_exact_cuda_norm_is_found(
    cuda_with_mistakes: Path, mistake: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded(load(cuda_with_mistakes), monkeypatch)
    make_mistake(cuda_with_mistakes, mistake)
    with nullcontext() if mistake is None else pytest.raises(AssertionError):
        check_everything()


# ---- Triton -----------------------------------------------------------------------------------------

MISTAKES = {
    "the error is not written": ("tl.store(own + 1, error)", "tl.store(own + 1, 0.0)"),
    "the error of the sum": ("(total - (added - part)) + (square - part)", "(total - (added - part))"),
    "the error of the square": ("(total - (added - part)) + (square - part)", "square - part"),
    "the last error alone": ("error += tl.where(", "error = tl.where("),
}


def check_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 17 chunks by one program. What a chunk adds up is exact here, in any order: squares have 15 bits. In
    general, its 256 squares are added in float32, and it is as exact as that: to ten roundings."""
    monkeypatch.setattr(triton_backend, "PROGRAMS", 1)
    monkeypatch.setattr(TritonKernels, "chunk", 32)
    weights = [Weight(rows=rows, columns=256, density=None) for rows in (8, 1, 8)]
    # Sums meet larger squares first, and smaller ones then.
    for weight, scale in zip(weights, (2.0**-10, 1.0, 2.0**-10), strict=True):
        weight.g.fill_(scale * (1 + 2.0**-7))
    plan = triton_backend.Triton().plan([weight.param() for weight in weights], [None] * 3)
    found = float(plan.squared_norm(inputs_of(weights, [Hyper().rule()]), "active"))
    expected = sum(float(weight.g.double().square().sum()) for weight in weights)
    assert found == pytest.approx(expected, rel=bound(17), abs=0.0)


@pytest.mark.interpreted
def test_the_triton_norm_is_a_sum_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    check_triton(monkeypatch)


@pytest.mark.interpreted
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_less_exact_triton_norm_is_found(
    tmp_path: Path, mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    substitute("triton_step", *MISTAKES[mistake], tmp_path, monkeypatch)
    with pytest.raises(AssertionError):
        check_triton(monkeypatch)
