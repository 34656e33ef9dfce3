"""Steps of the GPU backends as compiled for a GPU: their PTX is executed on a CPU (``ptx/machine.py``).

Triton's own launcher launches its kernels, and the host code of csrc/cuda its own. A few of each kind of
step: by ``make executed``, all tests of ``update_rule`` run likewise.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from backends import INTERPRETED, Backend, why_not, why_not_executed
from ptx.cuda_executed import CudaExecuted, Kernels
from ptx.mistakes import MISTAKES, NUMBERS, kernels_with_mistakes, number_of
from rules import DTYPES, EVERYTHING, FLOATS, NESTEROV
from side_by_side import SideBySide, Spec, pattern_mask, same_bits
from torch import Tensor
from torch.nn.parameter import Parameter
from triton_mutants import substitute

from sparseopt_kernels import SparseOpt
from sparseopt_kernels.kernels import cpu

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif(INTERPRETED, reason="Triton is interpreted in this run"),
]


@pytest.fixture(params=["triton", "cuda"])
def executed(request: pytest.FixtureRequest) -> Iterator[Backend]:
    chosen = Backend(request.param, "executed")
    reason = why_not(chosen)
    if reason is not None:
        pytest.skip(f"kernels of backend {request.param!r} cannot be executed: {reason}")
    with request.getfixturevalue(f"{request.param}_executed").active():
        yield chosen


# ---- against the oracle -----------------------------------------------------------------------------

COLUMNS = (1, 7, 8, 16, 27, 64, 129, 1000, 5000)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_any_length(executed: Backend, dtype: torch.dtype) -> None:
    """Two groups of all kinds of rows; masks and dense tensors, an overflow, masks that change."""
    specs = [Spec((3, columns), pattern, dtype) for columns in COLUMNS for pattern in ("half", "sparse90")]
    run = SideBySide(executed, [*specs, Spec((70,), None, dtype)], [EVERYTHING, NESTEROV], seed=1)
    run.step()
    run.step(grad_scale=4.0, found_inf=1.0)
    run.step(grad_scale=4.0, found_inf=0.0)
    for name, pattern in (("layer0", "full"), ("layer13", "sparse99"), ("layer16", "empty")):
        run.write_mask(name, run.new_mask(name, pattern))
    run.step()
    run.step()


# ---- against the CPU's kernels ----------------------------------------------------------------------

SHAPES = [(24, 40), (10,), (7, 13), (5, 3, 3, 3), (64,), (3, 1000), (6, 5), (2, 2100)]


class Scene(NamedTuple):
    momentum: float
    max_grad_norm: float | None
    first: dict[str, Any]  # of the group with momentum's variants
    second: dict[str, Any]


SCENES = {
    "plain": Scene(0.0, None, {}, {"maximize": True}),
    "everything": Scene(0.9, 1.0, {"ham_alpha": 2.0, "ham_beta": 0.01}, {"ham_alpha": 0.5, "momentum": 0.0}),
}


def trained(backend: str, dtype: torch.dtype, scene: Scene) -> list[Tensor]:
    """Weights and momentum after five steps of two groups, one with a learning rate in a tensor.

    One parameter is not aligned, and no gradient is in the second step; AMP's scale in the third, masks that
    changed in the fourth, an overflow in the fifth.
    """
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def unaligned(*shape: int) -> Tensor:
        return random(1 + torch.Size(shape).numel())[1:].view(shape)

    parameters = [Parameter(random(*shape)) for shape in SHAPES]
    parameters[2] = Parameter(unaligned(*SHAPES[2]))
    masks = {p: pattern_mask("sparse90", p.shape, generator) for p in parameters if p.ndim > 1}
    masks[parameters[6]].zero_()  # a layer without a weight, until masks change
    groups: list[dict[str, Any]] = [
        {"params": parameters[:4], "lr": torch.tensor(0.05), **scene.first},
        {"params": parameters[4:], "weight_decay": 0.0, "correction": "unnormalized", **scene.second},
    ]
    optimizer: Any = SparseOpt(
        groups,
        lr=0.1,
        momentum=scene.momentum,
        weight_decay=5e-4,
        max_grad_norm=scene.max_grad_norm,
        masks=masks,
        backend=backend,
    )
    for step in range(5):
        for p in parameters:
            p.grad = (unaligned if step == 1 else random)(*p.shape).mul_(1 + step)
        if step == 3:
            for mask in masks.values():
                mask.logical_xor_(torch.rand(mask.shape, generator=generator) < 0.1)
        if step in (2, 4):
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(float(step == 4))
        elif step == 3:
            del optimizer.grad_scale, optimizer.found_inf
        optimizer.step()
    momentum = [optimizer.state[p].get("momentum_buffer") for p in parameters]
    return [tensor.detach().clone() for tensor in (*parameters, *momentum) if tensor is not None]


@pytest.mark.skipif(
    cpu.CPU.unavailable(torch.device("cpu")) is not None, reason="the CPU backend is not built"
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scene", SCENES)
def test_the_bits_are_those_of_the_cpu(executed: Backend, scene: str, dtype: torch.dtype) -> None:
    """All operations are the same, and so are all bits, but for a few last ones where

    - float32 is not rounded: GPUs compute ``c_i`` in float32, the CPU's is rounded to it;
    - norms are summed up in another order, and HAM's exponential is another function.
    """
    if executed.name == "triton" and dtype is torch.float64:
        pytest.skip("the backend leaves float64 to the reference")
    ours, expected = (trained(name, dtype, SCENES[scene]) for name in (executed.name, "cpu"))
    if scene == "plain" and dtype is not torch.float32:
        assert all(map(same_bits, ours, expected))
        return
    pairs = [(a.double(), b.double()) for a, b in zip(ours, expected, strict=True)]
    error = max(float(((a - b).abs() / (b.abs() + b.abs().mean())).max()) for a, b in pairs)
    # In five steps; HAM makes up to five times of an error of its exponent.
    assert error <= 32 * torch.finfo(dtype).eps
    if dtype.itemsize == 2:
        assert sum(int((a != b).sum()) for a, b in pairs) <= sum(a.numel() for a, _ in pairs) // 1000


def test_all_kernels_are_executed(executed: Backend, request: pytest.FixtureRequest) -> None:
    """That the tests above test something."""
    trained(executed.name, torch.float32, SCENES["everything"])
    launches = request.getfixturevalue(f"{executed.name}_executed").launches
    assert set(launches) == {"count_rows", "list_sectors", "masked_step", "sector_step", "sector_squares"}
    assert min(launches.values()) >= 2


# ---- mistakes that are found ------------------------------------------------------------------------


@pytest.fixture(scope="session")
def with_mistakes(ptx_cache: Path) -> Kernels:
    return kernels_with_mistakes(ptx_cache)


def assert_found(expected: str, backend: str, dtype: torch.dtype, right: list[Tensor]) -> None:
    """A training with a mistake fails as expected, or ends with other numbers."""
    if expected != NUMBERS:
        with pytest.raises(RuntimeError, match=re.escape(expected)):
            trained(backend, dtype, SCENES["everything"])
        return
    assert not all(map(same_bits, trained(backend, dtype, SCENES["everything"]), right))


@pytest.fixture(scope="session")
def right_of_cuda(cuda_executed: CudaExecuted, with_mistakes: Kernels) -> dict[torch.dtype, list[Tensor]]:
    """What the build with mistakes computes without one."""
    with cuda_executed.active(with_mistakes):
        return {dtype: trained("cuda", dtype, SCENES["everything"]) for dtype in FLOATS}


@pytest.mark.skipif(why_not_executed("cuda") is not None, reason=str(why_not_executed("cuda")))
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_cuda_kernels_is_found(
    cuda_executed: CudaExecuted,
    with_mistakes: Kernels,
    right_of_cuda: dict[torch.dtype, list[Tensor]],
    mistake: str,
) -> None:
    _, expected, dtype = MISTAKES[mistake]
    with cuda_executed.active(with_mistakes, number_of(mistake)):
        assert_found(expected, "cuda", dtype, right_of_cuda[dtype])


TRITON_MISTAKES = {
    # The module, its text, what becomes of it, and what is said.
    "several threads read the last weights": (
        "triton_sectors",
        "row = tl.arange(0, SECTORS // WEIGHTS)[:, None]",
        "row = tl.arange(0, 1)[:, None]",
        "write of what another lane read",
    ),
    "rows that begin at whole vectors are taken for more": (
        "triton_step",
        "columns = tl.multiple_of(columns, WEIGHTS // 2)",
        "columns = tl.multiple_of(columns, 16)",
        "a misaligned address",
    ),
    "gradients taken for aligned where parameters are": (
        "triton_step",
        "    if GRADS_ALIGNED:\n        g =",
        "    if ALIGNED:\n        g =",
        "a misaligned address",
    ),
    "momentum that is not there": (
        "triton_step",
        "tl.load(at.b + e, mask=only_if(at.has_b, live), other=0.0)",
        "tl.load(at.b + e, mask=live, other=0.0)",
        "an address outside of live memory",
    ),
    "the owner of a chunk behind the last": (
        "triton_sectors",
        "+ number, mask=number < count, other=otherwise)",
        "+ number)",
        "an address outside of live memory",
    ),
    "the sums of no row before the first": (
        "triton_lists",
        "mask=entry.first_row > 0, other=0)",
        "mask=entry.first_row > -1, other=0)",
        "an address outside of live memory",
    ),
    "the mask behind its end": (
        "triton_lists",
        "mask=is_cut[:, :, None] & (e < elements), other=0)",
        "mask=is_cut[:, :, None], other=0)",
        "an address outside of live memory",
    ),
    "half precision cut off": (
        "triton_step",
        "tl.store(at.p + e, tl.where(active, weights.p, 0.0).to(TYPE), mask=live)",
        'tl.store(at.p + e, tl.where(active, weights.p, 0.0).to(TYPE, "rtz"), mask=live)',
        NUMBERS,
    ),
    "all programs write one sum": (
        "triton_step",
        "+ 2 * tl.program_id(0)",
        "+ 2 * (tl.program_id(0) // 2)",
        "write of what another lane wrote",
    ),
}


@pytest.mark.skipif(why_not_executed("triton") is not None, reason=str(why_not_executed("triton")))
@pytest.mark.parametrize("mistake", TRITON_MISTAKES)
def test_a_mistake_in_the_triton_kernels_is_found(
    triton_executed: Any, mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, old, new, expected = TRITON_MISTAKES[mistake]
    dtype = torch.bfloat16 if expected == NUMBERS else torch.float32
    with triton_executed.active():
        right = trained("triton", dtype, SCENES["everything"])
        substitute(module, old, new, tmp_path, monkeypatch)
        assert_found(expected, "triton", dtype, right)
