"""How blocks are visited: one result whatever the way, the instruction set and the threads."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from backends import ISA_VARIABLE
from oracle import Hyper
from rules import DTYPES, EVERYTHING, RULES
from side_by_side import pattern_mask, same_bits
from torch import Tensor
from torch.nn.parameter import Parameter

from sparseopt_kernels.kernels import cpu
from sparseopt_kernels.optimizer import SparseOpt

STRATEGY_VARIABLE = "SPARSEOPT_CPU_STRATEGY"
SHAPES = [
    (3, 5),
    (40, 27),
    (7, 4099),
    (1, 100_003),
    (70_001, 1),
    (16, 3, 3, 3),
    (64, 512),
    (300, 147),
    (90, 48),
]
PATTERNS = ("sparse90", "sparse99", "blocks", "single", "tail", "empty", "empty-rows")


def results(dtype: torch.dtype, rule: Hyper, threads: int = 1) -> list[Tensor]:
    """Weights and momentum buffers after three steps."""
    generator = torch.Generator().manual_seed(0)
    parameters, masks = [], {}
    for i, shape in enumerate(SHAPES):
        parameter = Parameter(torch.randn(shape, generator=generator).to(dtype))
        masks[parameter] = pattern_mask(PATTERNS[i % len(PATTERNS)], shape, generator)
        parameters.append(parameter)
    optimizer = SparseOpt(parameters, **vars(rule), masks=masks, backend="cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
            optimizer.step()
    finally:
        torch.set_num_threads(before)
    return [
        tensor.detach().clone()
        for parameter in parameters
        for tensor in (parameter, optimizer.state[parameter].get("momentum_buffer"))
        if tensor is not None
    ]


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        assert same_bits(x, y), f"tensor {i}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_the_list_gives_the_bits_of_the_stream(
    isa: str, dtype: torch.dtype, rule: Hyper, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for strategy in ("stream", "list"):
        monkeypatch.setenv(STRATEGY_VARIABLE, strategy)
        for threads in (1, 3):
            found[strategy, threads] = results(dtype, rule, threads)
    for other in found.values():
        assert_same(found["stream", 1], other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", [*RULES, pytest.param(EVERYTHING, id="everything")])
def test_avx512_has_the_bits_of_avx2(
    dtype: torch.dtype, rule: Hyper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both fuse multiply-adds; the baseline of x86, which cannot, differs in last bits."""
    if "avx512" not in cpu.available_isas():
        pytest.skip("this CPU has no avx512")
    found = []
    for isa in ("avx512", "avx2"):
        monkeypatch.setenv(ISA_VARIABLE, isa)
        found.append(results(dtype, rule))
    assert_same(*found)


def test_an_unknown_strategy_is_refused(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STRATEGY_VARIABLE, "skip")
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="SPARSEOPT_CPU_STRATEGY is 'skip', it must be stream or list"):
        SparseOpt([p], backend="cpu").step()
    assert p.tolist() == [1.0] * 3


MEASURE = """
import torch
from sparseopt_kernels import native_library
from sparseopt_kernels.optimizer import SparseOpt
from torch.nn.parameter import Parameter

def steps(sparsity, count):
    p = Parameter(torch.zeros(1024, 1024))
    p.grad = torch.zeros_like(p)
    masks = {p: torch.rand(p.shape) >= sparsity}
    optimizer = SparseOpt([p], lr=0.1, momentum=0.9, masks=masks, backend="cpu")
    for _ in range(count):
        optimizer.step()

def kinds():
    found = native_library.decisions()
    return [(int(16 * d.live_share), d.strategy, d.stream_ns > 0, d.list_ns > 0) for d in found]

assert kinds() == []
steps(0.5, 10)  # nearly all blocks are live: nothing to choose
assert kinds() == []
steps(0.999, 10)
decided = kinds()
assert [d[0] for d in decided] == [0] and decided[0][2:] == (True, True), decided
assert decided[0][1] == "list", decided  # one block in sixty is live
steps(0.999, 10)
assert kinds() == decided  # another optimizer knows it
steps(0.95, 10)
assert len(kinds()) == 2, kinds()
"""


def test_each_kind_is_measured() -> None:
    """In a process of its own: what is known lasts as long as that."""
    reason = cpu.CPU.unavailable(torch.device("cpu"))
    if reason is not None:
        pytest.skip(f"backend 'cpu': {reason}")
    result = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
