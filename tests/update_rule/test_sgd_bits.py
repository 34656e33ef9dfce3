"""Every backend against torch.optim.SGD, bit for bit."""

from __future__ import annotations

import copy
import itertools
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backends import ISA_VARIABLE, Backend, why_not
from side_by_side import pattern_mask, same_bits
from torch import Tensor
from torch.nn.parameter import Parameter

from sparseopt_kernels.correction import Correction, mask_factors
from sparseopt_kernels.neurons import Neurons
from sparseopt_kernels.optimizer import SparseOpt

SGD_RULES = {
    "plain": {"lr": 0.1},
    "momentum": {"lr": 0.1, "momentum": 0.9},
    "dampening": {"lr": 0.1, "momentum": 0.9, "dampening": 0.3},
    "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "weight-decay": {"lr": 0.1, "weight_decay": 0.01},
    "all": {"lr": 0.037, "momentum": 0.83, "weight_decay": 0.013, "nesterov": True, "maximize": True},
    "lr-zero": {"lr": 0.0, "momentum": 0.9},
}
SGD_SHAPES = [(), (1,), (7,), (33, 27), (3, 4097), (8, 3, 3, 3), (0, 4), (65, 64)]


@pytest.mark.same_bits_as_sgd
@pytest.mark.parametrize("hyper", SGD_RULES.values(), ids=SGD_RULES)
def test_without_a_mask_it_is_sgd_bit_for_bit(backend: Backend, hyper: dict) -> None:
    generator = torch.Generator().manual_seed(0)
    ours = [Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in SGD_SHAPES]
    theirs = copy.deepcopy(ours)
    optimizer = SparseOpt(ours, **hyper, backend=backend.name)
    sgd = torch.optim.SGD(theirs, **hyper, foreach=False)
    for step in range(20):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator, dtype=torch.float64)
            b.grad = a.grad.clone()
        optimizer.step()
        sgd.step()
        for a, b in zip(ours, theirs, strict=True):
            assert same_bits(a, b), f"step {step}, shape {tuple(a.shape)}"
            for key, want in sgd.state[b].items():
                assert same_bits(optimizer.state[a][key], want), f"step {step}, {key} of {tuple(a.shape)}"


@pytest.mark.same_bits_as_sgd
@pytest.mark.parametrize("correction", ["layer", "none"])
@pytest.mark.parametrize("pattern", ["full", "homogeneous", "homogeneous-sparse"])
@pytest.mark.parametrize("hyper", SGD_RULES.values(), ids=SGD_RULES)
def test_equal_fan_in_is_sgd_bit_for_bit_on_the_active_weights(
    backend: Backend, hyper: dict, pattern: str, correction: Correction
) -> None:
    """c_i is exactly 1.0, so the active weights move as those of dense SGD with the same gradients."""
    generator = torch.Generator().manual_seed(1)
    for shape in [(7, 27), (5, 4097), (3, 5, 3, 3), (6, 1), (16, 64)]:
        if pattern == "homogeneous-sparse":  # the same fan-in, few enough for a list of active blocks
            mask = torch.zeros(shape, dtype=torch.bool)
            for row in mask.view(shape[0], -1):
                row[torch.randperm(row.numel(), generator=generator)[: max(row.numel() // 100, 1)]] = True
        else:
            mask = pattern_mask(pattern, shape, generator)
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        ours, theirs = Parameter(value.clone()), Parameter(value.clone())
        optimizer = SparseOpt(
            [ours], **hyper, masks={ours: mask}, correction=correction, backend=backend.name
        )
        sgd = torch.optim.SGD([theirs], **hyper, foreach=False)
        for step in range(20):
            ours.grad = torch.randn(shape, generator=generator, dtype=torch.float64)
            theirs.grad = ours.grad.clone()
            optimizer.step()
            sgd.step()
            where = f"step {step}, shape {shape}"
            assert same_bits(ours[mask], theirs[mask]), where
            assert not ours[~mask].any(), where
            for key, want in sgd.state[theirs].items():
                assert same_bits(optimizer.state[ours][key][mask], want[mask]), f"{where}, {key}"


@pytest.mark.slow
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="compared in this process")
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86 alone has two paths")
def test_plain_path_has_the_bits_of_a_plain_pytorch() -> None:
    reason = why_not(Backend("cpu", "plain"))
    if reason is not None:
        pytest.skip(reason)
    tests = [str(Path(__file__).parents[1] / folder) for folder in ("update_rule", "optimizer", "step")]
    select = ["-m", "same_bits_as_sgd", "-k", "[cpu-plain"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *tests, *select, "-q", "-p", "no:cacheprovider"],
        env={**os.environ, "ATEN_CPU_CAPABILITY": "default"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "skipped" not in result.stdout


def test_the_instruction_set_that_is_asked_for_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows in the last bits: the plain path does not fuse multiply-adds, the others do."""
    for isa in ("avx2", "plain"):
        reason = why_not(Backend("cpu", isa))
        if reason is not None:
            pytest.skip(reason)
    results: dict[str, Tensor] = {}
    for isa in ("avx2", "plain", "avx2"):
        monkeypatch.setenv(ISA_VARIABLE, isa)
        generator = torch.Generator().manual_seed(0)
        p = Parameter(torch.randn(64, 64, generator=generator, dtype=torch.float64))
        p.grad = torch.randn(64, 64, generator=generator, dtype=torch.float64)
        SparseOpt([p], lr=0.1, weight_decay=0.1, backend="cpu").step()
        assert isa not in results or same_bits(results[isa], p)
        results[isa] = p.detach()
    assert not same_bits(results["avx2"], results["plain"])


@pytest.mark.parametrize("correction", ["layer", "none"])
def test_equal_fan_in_gives_factors_of_exactly_one(correction: Correction) -> None:
    for rows, fan_in in itertools.product([1, 3, 7, 10, 49], [1, 3, 7, 49, 333]):
        mask = torch.zeros(rows, 1000, dtype=torch.bool)
        for i in range(rows):
            mask[i, torch.randperm(1000)[:fan_in]] = True
        assert (mask_factors(mask, Neurons(), correction) == 1.0).all(), f"{rows} rows, {fan_in=}"
