"""The CPU loops on ARM, and under sanitizers: the same bits as here."""

from __future__ import annotations

import math
import platform
import shutil
from pathlib import Path

import pytest
import torch
from backends import INTERPRETED
from cpu_elsewhere import program as elsewhere
from cpu_elsewhere.program import Case, build, cases

from sparseopt_kernels.kernels import cpu

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++"),
    pytest.mark.skipif(INTERPRETED, reason="nothing here is Triton's"),
]
PLAIN = ("plain", "kPlainLoops", ())
AVX2 = ("avx2", "kAvx2Loops", ("-mavx2", "-mfma", "-mf16c"))
AVX512 = (
    "avx512",
    "kAvx512Loops",
    ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
)


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[bytes, bytes, float]]:
    """What the loops make of the cases here, with fused multiply-adds as on ARM."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("this CPU does not fuse multiply-adds")
    program = tmp_path_factory.mktemp("here") / "steps"
    build("g++", program, [AVX2], ["-DSPARSEOPT_X86"])
    return elsewhere.run([str(program)], cases(), SPARSEOPT_CPU_ISA="avx2")


@pytest.fixture(scope="module")
def arm() -> tuple[str, str]:
    """A compiler for ARM, and an emulator of it."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if not compiler or not emulator:
        pytest.skip("needs Debian's packages g++-aarch64-linux-gnu and qemu-user")
    return compiler, emulator


def test_arm_has_the_same_bits(
    tmp_path: Path, arm: tuple[str, str], fused: list[tuple[bytes, bytes, float]]
) -> None:
    compiler, emulator = arm
    program = tmp_path / "steps"
    build(compiler, program, [PLAIN], ["-static"])
    for strategy in ("stream", "list"):
        found = elsewhere.run([emulator, str(program)], cases(), SPARSEOPT_CPU_STRATEGY=strategy)
        for case, here, there in zip(cases(), fused, found, strict=True):
            assert_same(case, here, there)


def assert_same(case: Case, here: tuple[bytes, bytes, float], there: tuple[bytes, bytes, float]) -> None:
    assert here[:2] == there[:2], case
    assert here[2] == there[2] or math.isnan(here[2]), case


# Optimised code takes five times as long to compile, and hides accesses. So do checks that are not calls.
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g1", "-O0"]
SANITIZERS += ["--param", "asan-instrumentation-with-call-threshold=0"]


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="what is built is for x86")
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    """Addresses and undefined behaviour, with each instruction set that this CPU has; tensors are memory of
    their own, so that the first byte behind one is seen."""
    program = tmp_path / "steps"
    isas = cpu.available_isas() or ("plain",)
    loops = [own for own in (PLAIN, AVX2, AVX512) if own[0] in isas]
    build("g++", program, loops, ["-DSPARSEOPT_X86", *SANITIZERS])
    found = {}
    for isa in isas:
        for strategy in ("stream", "list"):
            environment = {"SPARSEOPT_CPU_ISA": isa, "SPARSEOPT_CPU_STRATEGY": strategy}
            found[isa, strategy] = elsewhere.run([str(program)], cases(), **environment)
        for case, stream, by_list in zip(cases(), found[isa, "stream"], found[isa, "list"], strict=True):
            assert_same(case, stream, by_list)
