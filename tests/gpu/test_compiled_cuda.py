"""What nvcc makes of csrc/cuda: vector accesses, registers, no local memory, no double precision.

It takes no GPU to compile for one. Where there is no nvcc, nothing here runs.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
from cuda_code import NVCC, SOURCES, Compiled, compile_file
from machine_code import accesses, cuobjdump, float64

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif(NVCC is None, reason="there is no nvcc"),
    pytest.mark.skipif(cuobjdump() is None, reason="there is no cuobjdump"),
]

ARCHITECTURES = [80, 90, 100]
FILES = ["lists", "masked_step", "sector_squares", "sector_step"]
BYTES = {"float": 4, "double": 8, "BFloat16": 2, "Half": 2}
STREAMS = {
    "masked_step": (3, 2),
    "sector_step": (3, 2),
    "sector_squares": (1, 0),
}  # p, g, b read, p and b written
KERNELS = [(kernel, stored) for kernel in STREAMS for stored in BYTES]

# Beside weights, at most: tables and owners, mask bytes or bits, c_i or the mean fan-in, numbers of rules and
# of AMP. A step by sectors reads its table three times over, rather than have it in registers.
OTHER_LOADS = {"masked_step": 42, "sector_step": 39, "sector_squares": 27}

# With nvcc 13.0, at most, of the three architectures. 64 of __launch_bounds__ leave four blocks of 256
# threads on a multiprocessor, and nothing in local memory.
REGISTERS = {
    ("masked_step", "float"): 64,
    ("masked_step", "BFloat16"): 64,
    ("masked_step", "Half"): 64,
    ("masked_step", "double"): 176,  # 167
    ("sector_step", "float"): 64,
    ("sector_step", "BFloat16"): 64,
    ("sector_step", "Half"): 64,
    ("sector_step", "double"): 128,  # 118
    ("sector_squares", "float"): 56,  # 45
    ("sector_squares", "BFloat16"): 64,  # 59
    ("sector_squares", "Half"): 64,  # 56
    ("sector_squares", "double"): 80,  # 68
    ("count_rows", "4"): 48,  # 40
    ("count_rows", "8"): 40,  # 32
    ("count_rows", "16"): 40,  # 32
    ("list_sectors", "4"): 48,  # 37
    ("list_sectors", "8"): 40,  # 32
    ("list_sectors", "16"): 40,  # 32
}


def lanes(kernel: str, stored: str) -> int:
    """How many weights a thread reads and writes together: those of eight mask bytes, or of a sector."""
    return 8 if kernel == "masked_step" else 32 // BYTES[stored]


def compile_files(architecture: int, names: Sequence[str]) -> dict[tuple[str, str], Compiled]:
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as two:
        found = two.map(lambda name: compile_file(name, architecture, Path(folder)), names)
        return {key: kernel for own in found for key, kernel in own.items()}


@cache
def kernels(architecture: int) -> dict[tuple[str, str], Compiled]:
    assert NVCC is not None
    known = subprocess.run([NVCC, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout
    if f"sm_{architecture}" not in known.split():
        pytest.skip(f"this nvcc does not compile for sm_{architecture}")
    return compile_files(architecture, FILES)


def vectors_are_right(compiled: Compiled, kernel: str, stored: str) -> bool:
    """Accesses of weights: all together as vectors of 128 bits, and, where they are cut off by the end of a
    row or a tensor or not aligned, one access a weight; each written once in the code. So that a redundant
    one is noticed, all others are counted."""
    size, count = 8 * BYTES[stored], lanes(kernel, stored)
    loads, stores = STREAMS[kernel]
    read, written = accesses(compiled.opcodes, "LDG"), accesses(compiled.opcodes, "STG")
    vectors = count * size // 128
    others = sum(read.values()) - loads * (vectors + count)
    sums = Counter({max(size, 32): 2}) if kernel == "sector_squares" else Counter()
    return (
        read[128] == loads * vectors
        and read[size] >= loads * count
        and others <= OTHER_LOADS[kernel]
        and written == Counter({128: stores * vectors}) + Counter({size: stores * count}) + sums
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("kernel", "stored"), KERNELS)
def test_weights_are_accessed_by_vectors(architecture: int, kernel: str, stored: str) -> None:
    """A float32 sector is two accesses of 16 bytes, not eight: the memory system sees a quarter of the
    requests. The kind of memory is known (global), which saves looking it up."""
    compiled = kernels(architecture)[kernel, stored]
    assert vectors_are_right(compiled, kernel, stored)
    assert not accesses(compiled.opcodes, "LD")
    assert not accesses(compiled.opcodes, "ST")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernel", ["masked_step", "sector_step"])
@pytest.mark.parametrize("stored", BYTES)
def test_all_is_read_before_anything_is_written(architecture: int, kernel: str, stored: str) -> None:
    """Three streams are under way at once: no load waits behind a store that it might depend on."""
    vectors = [o.split(".")[0] for o in kernels(architecture)[kernel, stored].opcodes if o.endswith(".128")]
    moved = [opcode for opcode in vectors if opcode in ("LDG", "STG")]
    assert moved == sorted(moved)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernel", ["masked_step", "sector_step"])
def test_half_precision_is_converted_by_instructions(architecture: int, kernel: str) -> None:
    """Of integer arithmetic, there are ten for each number."""
    for stored, name in (("Half", "F2FP"), ("BFloat16", "F2FP.BF16")):
        assert any(o.startswith(name) for o in kernels(architecture)[kernel, stored].opcodes)
    half, single = (kernels(architecture)[kernel, stored].code for stored in ("Half", "float"))
    assert len(half) / lanes(kernel, "Half") < 1.2 * len(single) / lanes(kernel, "float")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("kernel", "stored"), REGISTERS)
def test_registers_suffice(
    architecture: int, kernel: str, stored: str, record_property: Callable[[str, object], None]
) -> None:
    compiled = kernels(architecture)[kernel, stored]
    record_property("registers", compiled.usage["REG"])
    assert compiled.local_memory == 0
    assert compiled.usage["REG"] <= REGISTERS[kernel, stored]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_double_kernels_have_double_precision(architecture: int) -> None:
    """A literal such as 0.5 without its f makes a float32 kernel compute in double precision, at a 64th of
    the speed on most GPUs."""
    with_float64 = {key for key, compiled in kernels(architecture).items() if float64(compiled.opcodes)}
    assert with_float64 == {(kernel, "double") for kernel in STREAMS}


MUTATIONS = {
    "vectors": ("cuda/sector_step.cu", "vectors = count == kWeights", "vectors = false && count == kWeights"),
    "double": ("update_rule.h", "exponent < T(-5),", "exponent < -5.1,"),
    "spills": ("cuda/threads.h", "sizeof(T) == sizeof(float) ? 4 : 2", "8"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_these_tests_can_fail(name: str, tmp_path: Path) -> None:
    """Each of the checks above finds what it is for in a copy of the sources that has it."""
    file, old, new = MUTATIONS[name]
    shutil.copytree(SOURCES, tmp_path / "csrc")
    text = (tmp_path / "csrc" / file).read_text()
    assert text.count(old) == 1
    (tmp_path / "csrc" / file).write_text(text.replace(old, new))
    key = "sector_step", "float"
    mutant = compile_file("sector_step", ARCHITECTURES[0], tmp_path, tmp_path / "csrc")[key]
    assert vectors_are_right(mutant, *key) == (name != "vectors")
    assert bool(float64(mutant.opcodes)) == (name == "double")
    assert bool(mutant.local_memory) == (name == "spills")
