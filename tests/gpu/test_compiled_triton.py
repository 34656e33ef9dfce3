"""What Triton makes of its kernels: vector accesses, registers, no local memory, no double precision.

Steps of the optimizer whose launches stop after compilation: so these are the very kernels and arguments
of a training run, for GPUs that need not be here. ``machine_code`` reads what NVIDIA's assembler made.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from machine_code import accesses, cuobjdump, float64, opcodes, usage
from torch import Tensor
from triton_launches import AMD, NVIDIA, SETTINGS, TARGETS, Launch, launches, launches_of_steps
from triton_mutants import substitute

from sparseopt_kernels.kernels.contract import Rule
from sparseopt_kernels.kernels.gpu import triton as backend
from sparseopt_kernels.kernels.gpu.tables import SectorRow

pytestmark = pytest.mark.compiled
needs_cuobjdump = pytest.mark.skipif(cuobjdump() is None, reason="there is no cuobjdump")

# All that a row of the table says, of the next chunk as well; where the gradient is, and masks of a thread.
ADDRESSES = 2 * len(SectorRow._fields) + 1 + 4
# owner, listed, factors (two, and those of a rest), chunks, divisor, found_inf, grad_scale; two groups'
# lr and gamma. Twice: PTX has some of them at several places.
NUMBERS = 2 * 12

# Not all of 4 targets x 3 dtypes x 3 settings: a kernel takes a third of a second. All five are of sm_90. Of
# sm_80 and sm_100, whose code is that of sm_90 but for a few instructions, and of AMD's there are two.
VARIANTS = [
    (torch.float32, "sgd"),
    (torch.float32, "momentum"),
    (torch.float32, "everything"),
    (torch.bfloat16, "everything"),
    (torch.float16, "momentum"),
]
FEWER = VARIANTS[2::2]
BUILDS = [
    pytest.param(target, dtype, setting, id=f"{target}-{str(dtype).removeprefix('torch.')}-{setting}")
    for target in TARGETS
    for dtype, setting in (VARIANTS if target == "sm_90" else FEWER)
]


def each(builds: Sequence[Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("target", "dtype", "setting"), builds)


each_build = each(BUILDS)
each_of_nvidia = each([build for build in BUILDS if build.values[0] in NVIDIA])

# Of a thread, at most, with Triton 3.7: the most of all dtypes and NVIDIA architectures, by setting. Programs
# have 32 threads, of which a multiprocessor with 65536 registers holds 32 at 64 registers, and 25 at 80.
REGISTERS = {
    "sector_step": {"sgd": 64, "momentum": 80, "everything": 95},
    "sector_step (unaligned)": {"sgd": 80, "momentum": 214, "everything": 214},
    "sector_step (gradients unaligned)": {"sgd": 64, "momentum": 80, "everything": 95},
    "sector_squares": {"everything": 60},
    "sector_squares (unaligned)": {"everything": 78},
    "sector_squares (gradients unaligned)": {"everything": 78},
    "masked_step": {"sgd": 78, "momentum": 94, "everything": 102},
    "masked_step (unaligned)": {"sgd": 78, "momentum": 107, "everything": 107},
    "count_rows": {"sgd": 64, "momentum": 95, "everything": 95},
    "list_sectors": {"sgd": 52, "momentum": 52, "everything": 52},
}
SLACK = 8  # they are given out in eights
AMD_REGISTERS = 128  # of 512: four waves on each unit; twice as many where memory is not aligned


# Accesses of global memory.
_PTX_ACCESS = re.compile(r"\b(ld|st)\.global(?:\.v(\d))?\.b(\d+)\b")
_AMD_ACCESS = re.compile(r"\b(?:global|flat|buffer)_(load|store)_([a-z]+?)(?:x(\d))?\b")
_AMD_BITS = {"dword": 32, "ushort": 16, "short": 16, "ubyte": 8, "byte": 8}


def accesses_in(assembly: str, target: str) -> tuple[Counter[int], Counter[int]]:
    """Loads and stores by bits. On AMD's GPUs, what all threads read alike is not among them."""
    found: dict[str, Counter[int]] = {"l": Counter(), "s": Counter()}
    if target in NVIDIA:
        assert len(re.findall(r"\b(?:ld|st)\.global\b", assembly)) == len(_PTX_ACCESS.findall(assembly))
        for kind, vector, bits in _PTX_ACCESS.findall(assembly):
            found[kind[0]][int(vector or 1) * int(bits)] += 1
    else:
        for kind, unit, count in _AMD_ACCESS.findall(assembly):
            found[kind[0]][int(count or 1) * _AMD_BITS[unit]] += 1
    return found["l"], found["s"]


def check_accesses(launch: Launch, target: str, read: Counter[int], written: Counter[int]) -> None:
    """A thread has one sector, as two vectors of 16 bytes, or, where memory is not aligned, weight by weight:
    of all tensors, or of gradients alone.
    The rest of a tensor, of less than 16 bytes, is one weight for each thread. Besides, there are masks (8 to
    64 bits), the table (64) and numbers (32), nothing of which is written."""
    bits, vectors = 8 * launch.size, 32 // 16
    weights = 32 // launch.size if launch.aligned or launch.kernel.startswith("sector") else 8
    is_sector_step, is_half = launch.kernel.startswith("sector"), bits == 16
    reads, writes = launch.streams
    single = reads  # tensors that are read weight by weight
    if launch.aligned:
        single = int(not launch.grads_aligned)
        # AMD's read rows of the table so, too.
        expected_vectors = vectors * (reads - single)
        assert read[128] == expected_vectors or (target in AMD and read[128] > expected_vectors)
        assert read[bits] >= is_sector_step * reads + weights * single
        expected = Counter({128: vectors * writes}) + Counter({bits: is_sector_step * writes})
    else:
        assert read[128] == 0 or target in AMD
        assert read[bits] >= weights * reads
        expected = Counter({bits: weights * writes})
    if writes:
        assert written == expected
    else:
        assert written in ({32: 2}, {64: 1})  # a sum and its error
    assert set(read) <= {128, 64, 32, 16, 8} | ({96} if target in AMD else set())
    assert read[64] <= ADDRESSES
    of_weights = is_sector_step * launch.aligned * reads + weights * single
    assert read[32] <= NUMBERS + (0 if is_half else of_weights) + (not launch.aligned) * weights
    if is_half and single:
        assert read[16] <= of_weights + 5


@each_build
def test_weights_are_accessed_by_vectors(target: str, dtype: torch.dtype, setting: str) -> None:
    """A predicate that differs within 16 bytes, or memory that is not known to be aligned, would make eight
    accesses of one or two."""
    for launch in launches(target, dtype, setting):
        if launch.of_weights:
            check_accesses(launch, target, *accesses_in(launch.assembly(target), target))


@each([build for build in BUILDS if build.values[0] in NVIDIA and build.values[2] == "momentum"])
def test_masks_are_counted_by_words(target: str, dtype: torch.dtype, setting: str) -> None:
    """Of half a sector, 4 or 8 bytes: a thread has both halves of two. Beside them, as many bits are in the
    owner, or in what is read of the table."""
    bits, others = (32, 1) if dtype == torch.float32 else (64, 7)
    for launch in launches(target, dtype, setting):
        if launch.kernel == "count_rows":
            read, _ = accesses_in(launch.assembly(target), target)
            assert read[bits] == others + 4


@needs_cuobjdump
@each([build for build in BUILDS if build.values[0] in NVIDIA and build.values[1:] in FEWER])
def test_the_assembler_keeps_the_vectors(
    target: str, dtype: torch.dtype, setting: str, tmp_path: Path
) -> None:
    for launch in launches(target, dtype, setting):
        if launch.of_weights:
            (code,) = opcodes(launch.cubin(tmp_path)).values()
            check_accesses(launch, target, accesses(code, "LDG"), accesses(code, "STG"))
            assert not float64(code)


@needs_cuobjdump
@each_of_nvidia
def test_no_thread_waits_for_others(target: str, dtype: torch.dtype, setting: str, tmp_path: Path) -> None:
    """Each has the sector whose number it has read: nothing goes to other threads."""
    for launch in launches(target, dtype, setting):
        if launch.kernel == "sector_step" and launch.aligned:
            (code,) = opcodes(launch.cubin(tmp_path)).values()
            assert not {o.split(".")[0] for o in code} & {"BAR", "SHFL", "LDS", "STS", "LDSM"}, launch.name


@each_build
def test_there_is_no_double_precision(target: str, dtype: torch.dtype, setting: str) -> None:
    """Most GPUs compute in it at a 64th of the speed."""
    instruction = r"\.f64\b" if target in NVIDIA else r"\bv_\w*f64"
    for launch in launches(target, dtype, setting):
        assert not re.findall(instruction, launch.assembly(target)), launch.name


@needs_cuobjdump
@each_of_nvidia
def test_registers_suffice(
    target: str,
    dtype: torch.dtype,
    setting: str,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    for launch in launches(target, dtype, setting):
        (taken,) = usage(launch.cubin(tmp_path)).values()
        record_property(launch.name, taken["REG"])
        assert taken["STACK"] == taken["LOCAL"] == 0, launch.name
        assert taken["REG"] <= REGISTERS[launch.name][setting] + SLACK, launch.name


@each([build for build in BUILDS if build.values[0] in AMD])
def test_registers_suffice_on_amd(
    target: str, dtype: torch.dtype, setting: str, record_property: Callable[[str, object], None]
) -> None:
    for launch in launches(target, dtype, setting):
        taken = {
            name: int(number)
            for name, number in re.findall(r"\.(\w+):\s+(\d+)\s*$", launch.assembly(target), re.M)
        }
        record_property(launch.name, taken["vgpr_count"])
        assert taken["private_segment_fixed_size"] == 0, launch.name
        assert taken["vgpr_spill_count"] == 0, launch.name
        # Scalar registers go to vector registers, not to memory: predicates, of single weights where memory
        # is not aligned.
        assert taken["sgpr_spill_count"] <= (8 if launch.aligned else 48), launch.name
        assert taken["vgpr_count"] <= AMD_REGISTERS * (1 if launch.aligned else 2), launch.name


OTHER_NUMBERS = {
    "lr": 1.0,
    "momentum": 0.5,
    "weight_decay": 1.0,
    "maximize": True,
    "correction": "none",
    "ham_alpha": 16.0,
    "ham_beta": 0.25,
    "max_grad_norm": 16.0,
}


def compiled_of(setting: str, **hyperparameters: Any) -> list[object]:
    found = launches_of_steps(TARGETS["sm_90"], torch.float32, SETTINGS[setting], **hyperparameters)
    return [launch.compiled for launch in found]


@pytest.mark.parametrize("name", OTHER_NUMBERS)
def test_another_hyperparameter_is_the_same_kernel(name: str) -> None:
    """Learning rates change with every step. 1 and 16 are what Triton would compile anew for, as integers."""
    setting = "everything" if name.startswith(("ham", "max_grad_norm")) else "momentum"
    assert compiled_of(setting) == compiled_of(setting, **{name: OTHER_NUMBERS[name]})


def test_integers_would_be_another_kernel() -> None:
    """That the test above can fail."""

    def with_an_integer(rule: Rule, tensors: list[Tensor]) -> backend.RuleArgument:
        return argument(rule, tensors)._replace(weight_decay=int(rule.weight_decay))

    argument = backend._argument
    with mock.patch.object(backend, "_argument", with_an_integer):
        assert compiled_of("sgd", weight_decay=1.0) != compiled_of("sgd", weight_decay=2.0)


def test_what_a_training_run_compiles() -> None:
    """Six kernels at most: for masks that are new, for those that stay, and for the norm; none for a number
    that is an integer, or comes in a tensor, or is None, and none for memory that lies elsewhere."""
    kernels = set[object]()
    for more in ({}, {"lr": 1}, {"lr": torch.tensor(0.1)}, {"lr": torch.tensor(0.1), "max_grad_norm": 1.0}):
        kernels |= set(compiled_of("momentum", **more))
    assert len(kernels) == 6


MUTATIONS = {
    "a predicate per weight": (
        "triton_step",
        "live_left = (chunk.active != 0) & (e + left < end)",
        "live_left = bits_of(chunk.active, left) & (e + left < end)",
    ),
    "addresses of unknown alignment": (
        "triton_step",
        "p, b = tl.multiple_of(p, 16), tl.multiple_of(b, 16)",
        "pass",
    ),
    "gradients of unknown alignment": ("triton_step", "g = tl.multiple_of(g, 16)", "pass"),
    "an end of unknown alignment": (
        "triton_sectors",
        "end = end // (WEIGHTS // 2) * (WEIGHTS // 2)",
        "pass",
    ),
    "double precision": (
        "triton_step",
        "p = tl.load(at.p + e, mask=live, other=0.0).to(tl.float32)",
        "p = tl.load(at.p + e, mask=live, other=0.0).to(tl.float64)",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_worse_kernel_is_noticed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks above fail for kernels with what they look for."""
    substitute(*MUTATIONS[name], tmp_path, monkeypatch)
    found = launches_of_steps(TARGETS["sm_90"], torch.float32, SETTINGS["momentum"])
    (launch,) = (launch for launch in found if launch.kernel == "sector_step")
    ptx = launch.assembly("sm_90")
    if name == "double precision":
        assert ".f64" in ptx
    else:
        with pytest.raises(AssertionError):
            check_accesses(launch, "sm_90", *accesses_in(ptx, "sm_90"))


@needs_cuobjdump
def test_spills_are_noticed(tmp_path: Path) -> None:
    """With a third of the registers that a thread needs."""
    with mock.patch.dict(backend._OPTIONS, maxnreg=24):
        found = launches_of_steps(TARGETS["sm_90"], torch.float32, SETTINGS["momentum"])
    (launch,) = (launch for launch in found if launch.kernel == "sector_step")
    (taken,) = usage(launch.cubin(tmp_path)).values()
    assert taken["STACK"] + taken["LOCAL"] > 0
