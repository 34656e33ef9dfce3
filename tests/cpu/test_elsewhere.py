"""The CPU loops on ARM, and under sanitizers: the same bits as here."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from backends import INTERPRETED
from cpu_elsewhere import program as elsewhere
from cpu_elsewhere.program import Case, build, cases

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++"),
    pytest.mark.skipif(INTERPRETED, reason="nothing here is Triton's"),
]
PLAIN = ("plain", "kPlainLoops", ())
AVX2 = ("avx2", "kAvx2Loops", ("-mavx2", "-mfma", "-mf16c"))


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[bytes, bytes, float]]:
    """What the loops make of the cases here, with fused multiply-adds as on ARM."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("this CPU does not fuse multiply-adds")
    program = tmp_path_factory.mktemp("here") / "steps"
    build("g++", program, [PLAIN, AVX2, ("avx512", "kAvx512Loops", AVX2[2])], ["-DSPARSEOPT_X86"])
    return elsewhere.run([str(program)], cases(), SPARSEOPT_CPU_ISA="avx2")


def test_arm_has_the_same_bits(tmp_path: Path, fused: list[tuple[bytes, bytes, float]]) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if not compiler or not emulator:
        pytest.skip("needs Debian's packages g++-aarch64-linux-gnu and qemu-user")
    program = tmp_path / "steps"
    build(compiler, program, [PLAIN], ["-static"])
    for strategy in ("stream", "list"):
        found = elsewhere.run([emulator, str(program)], cases(), SPARSEOPT_CPU_STRATEGY=strategy)
        for case, here, there in zip(cases(), fused, found, strict=True):
            assert_same(case, here, there)


def assert_same(case: Case, here: tuple[bytes, bytes, float], there: tuple[bytes, bytes, float]) -> None:
    assert here[:2] == there[:2], case
    assert here[2] == there[2] or math.isnan(here[2]), case
