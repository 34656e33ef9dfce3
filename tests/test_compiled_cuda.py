"""What nvcc makes of csrc/cuda: vector accesses, registers, no local memory, no double precision.

It takes no GPU to compile for one. Where there is no nvcc, nothing here runs.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from machine_code import accesses, cuobjdump, float64, opcodes, usage

SOURCES = Path(__file__).parent.parent / "csrc"
NVCC = shutil.which("nvcc") or ""
pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif(not NVCC, reason="there is no nvcc"),
    pytest.mark.skipif(cuobjdump() is None, reason="there is no cuobjdump"),
]

ARCHITECTURES = [80, 90, 100]
BYTES = {"float": 4, "double": 8, "BFloat16": 2, "Half": 2}
LANES = 8  # weights of one mask byte: a thread reads and writes them together
STREAMS = {"step": (3, 2), "norm": (1, 0)}  # p, g, b read, p and b written; g read
KERNELS = [(kernel, stored) for kernel in STREAMS for stored in BYTES]

# Beside weights. In the type of the arithmetic: step reads gamma, a learning rate and the mean fan-in, norm
# the mean fan-in, and norm writes its sum in two parts.
NUMBERS = {"step": (3, 0), "norm": (1, 2)}
# 32 bits: a word of mask bits and, in step, found_inf and grad_scale.
WORDS = {"step": 3, "norm": 1}
MASK_BYTES = 2  # to count the fan-in where there is no whole word, and as the predicate

# With nvcc 13.0, at most, of the three architectures. 64 of __launch_bounds__ leave four blocks of 256
# threads on a multiprocessor, and nothing in local memory; 40 leave six.
REGISTERS = {
    ("step", "float"): 64,
    ("step", "BFloat16"): 64,
    ("step", "Half"): 64,
    ("step", "double"): 184,  # 178
    ("norm", "float"): 40,  # 36
    ("norm", "BFloat16"): 40,  # 32
    ("norm", "Half"): 40,  # 32
    ("norm", "double"): 56,  # 48
    ("pack", ""): 40,  # 31
}


@dataclass(frozen=True)
class Compiled:
    """One kernel: its instructions and what it takes."""

    code: list[str]
    usage: dict[str, int]

    @property
    def local_memory(self) -> int:
        return self.usage["STACK"] + self.usage["LOCAL"]


def flags() -> list[str]:
    """nvcc's, from the build."""
    found = re.search(r"COMPILE_LANGUAGE:CUDA>:([^>]*)>", (SOURCES / "cuda/module.cmake").read_text())
    assert found is not None
    return found[1].split(";")


def compile_sources(architecture: int, names: list[str], sources: Path) -> dict[tuple[str, str], Compiled]:
    """The kernels of csrc/cuda, by kernel and type of the weights."""
    with tempfile.TemporaryDirectory() as folder:

        def compiled(name: str) -> dict[tuple[str, str], Compiled]:
            cubin = Path(folder, f"{name}.cubin")
            command = [NVCC, "-std=c++17", *flags(), f"-arch=sm_{architecture}", "-cubin", "-o", str(cubin)]
            subprocess.run([*command, sources / "cuda" / f"{name}.cu"], check=True)
            taken = usage(cubin)
            return {
                _key(function): Compiled(code, taken[function]) for function, code in opcodes(cubin).items()
            }

        with ThreadPoolExecutor(2) as two:
            return {key: kernel for found in two.map(compiled, names) for key, kernel in found.items()}


def _key(function: str) -> tuple[str, str]:
    """Of a mangled name: ...step_kernelINS_4HalfEfE..., ...norm_kernelIddE..., ...pack_kernelE..."""
    found = re.search(r"(step|norm|pack)_kernel(?:I(?:NS_\d+(\w+?)E)?([fd]))?", function)
    assert found is not None, function
    kernel, stored, arithmetic = found.groups()
    return kernel, stored or {"f": "float", "d": "double", None: ""}[arithmetic]


@cache
def kernels(architecture: int) -> dict[tuple[str, str], Compiled]:
    known = subprocess.run([NVCC, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout
    if f"sm_{architecture}" not in known.split():
        pytest.skip(f"this nvcc does not compile for sm_{architecture}")
    return compile_sources(architecture, ["step", "norm", "pack"], SOURCES)


def expected_accesses(kernel: str, stored: str) -> tuple[Counter[int], Counter[int]]:
    """Loads and stores by bits: whole octets as vectors of 128, and, for those that are cut off by the end of
    a row or not aligned, one access a weight; each written once in the code."""
    bits, arithmetic = 8 * BYTES[stored], 64 if stored == "double" else 32
    loads, stores = STREAMS[kernel]
    numbers_read, numbers_written = NUMBERS[kernel]
    read = Counter({128: loads * LANES * bits // 128})
    read += Counter({bits: loads * LANES})
    read += Counter({arithmetic: numbers_read}) + Counter({32: WORDS[kernel]}) + Counter({8: MASK_BYTES})
    written = Counter({128: stores * LANES * bits // 128}) + Counter({bits: stores * LANES})
    return read, written + Counter({arithmetic: numbers_written})


def vectors_are_right(compiled: Compiled, kernel: str, stored: str) -> bool:
    return expected_accesses(kernel, stored) == (
        accesses(compiled.code, "LDG"),
        accesses(compiled.code, "STG"),
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("kernel", "stored"), KERNELS)
def test_whole_octets_are_accessed_by_vectors(architecture: int, kernel: str, stored: str) -> None:
    """A float32 octet is two accesses of 16 bytes, not eight: the memory system sees a quarter of the
    requests. All accesses are accounted for, so that a redundant one is noticed, too."""
    code = kernels(architecture)[kernel, stored].code
    read, written = expected_accesses(kernel, stored)
    assert accesses(code, "LDG") == read
    assert accesses(code, "STG") == written


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("stored", BYTES)
def test_all_is_read_before_anything_is_written(architecture: int, stored: str) -> None:
    """Three streams are under way at once: no load waits behind a store that it might depend on."""
    vectors = [o.split(".")[0] for o in kernels(architecture)["step", stored].code if o.endswith(".128")]
    moved = [opcode for opcode in vectors if opcode in ("LDG", "STG")]
    assert moved == sorted(moved)


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
    with_float64 = {key for key, compiled in kernels(architecture).items() if float64(compiled.code)}
    assert with_float64 == {("step", "double"), ("norm", "double")}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packing_reads_and_writes_bytes(architecture: int) -> None:
    code = kernels(architecture)["pack", ""].code
    assert set(accesses(code, "LDG")) == set(accesses(code, "STG")) == {8}
    assert any(opcode.startswith("RED") for opcode in code)  # the count: one addition per warp


MUTATIONS = {
    "vectors": ("cuda/step.cu", "const bool vectors = count", "const bool vectors = false && count"),
    "double": ("update_rule.h", "exponent < T(-5),", "exponent < -5.1,"),
    "spills": ("cuda/step.cu", "sizeof(T) == sizeof(float) ? 4 : 1", "8"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_these_tests_can_fail(name: str, tmp_path: Path) -> None:
    """Each of the checks above finds what it is for in a copy of the sources that has it."""
    file, old, new = MUTATIONS[name]
    shutil.copytree(SOURCES, tmp_path / "csrc")
    text = (tmp_path / "csrc" / file).read_text()
    assert text.count(old) == 1
    (tmp_path / "csrc" / file).write_text(text.replace(old, new))
    mutant = compile_sources(ARCHITECTURES[0], ["step"], tmp_path / "csrc")["step", "float"]
    assert vectors_are_right(mutant, "step", "float") == (name != "vectors")
    assert bool(float64(mutant.code)) == (name == "double")
    assert bool(mutant.local_memory) == (name == "spills")
