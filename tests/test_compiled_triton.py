"""What Triton makes of its kernels: vector accesses, registers, no local memory, no double precision.

Steps of the optimizer whose launches stop after compilation: so these are the very kernels and arguments
of a training run, for GPUs that need not be here. ``machine_code`` reads what NVIDIA's assembler made.
"""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
from machine_code import accesses, cuobjdump, float64, opcodes, usage
from triton_launches import AMD, NVIDIA, SETTINGS, SHAPES, TARGETS, Launch, launches, launches_of_a_step

from sparseopt_kernels.kernels import triton as backend
from sparseopt_kernels.kernels import triton_plan, triton_step
from sparseopt_kernels.kernels.contract import Rule

pytestmark = pytest.mark.compiled
needs_cuobjdump = pytest.mark.skipif(cuobjdump() is None, reason="there is no cuobjdump")

# All that a row of the table says, and where the gradient is.
ADDRESSES = len(triton_plan.TableRow._fields) + 1
# owner, mean fan-in, found_inf, grad_scale, two groups' lr and gamma; PTX has some of them twice.
NUMBERS = 2 * 8

# Not all of 4 targets x 3 dtypes x 3 settings: a kernel takes a third of a second.
VARIANTS = [
    (torch.float32, "sgd"),
    (torch.float32, "momentum"),
    (torch.float32, "everything"),
    (torch.bfloat16, "everything"),
    (torch.float16, "momentum"),
]
each_target = pytest.mark.parametrize("target", TARGETS)
each_nvidia = pytest.mark.parametrize("target", NVIDIA)
each_variant = pytest.mark.parametrize(
    ("dtype", "setting"), VARIANTS, ids=[f"{str(d).removeprefix('torch.')}-{s}" for d, s in VARIANTS]
)

# Of a thread, with Triton 3.9: the most of all dtypes and NVIDIA architectures, by setting. 128 threads a
# program and 65536 registers a multiprocessor: 64 leave eight programs, 128 four.
REGISTERS = {
    "masked_step (short)": {"sgd": 64, "momentum": 90, "everything": 120},
    "masked_step (short, unaligned)": {"sgd": 53, "momentum": 80, "everything": 90},
    "masked_step (long)": {"sgd": 40, "momentum": 56, "everything": 64},
    "masked_step (long, unaligned)": {"sgd": 51, "momentum": 80, "everything": 88},
    "dense_step (dense)": {"sgd": 32, "momentum": 50, "everything": 72},
    "dense_step (dense, unaligned)": {"sgd": 47, "momentum": 64, "everything": 72},
    "masked_squares (short)": {"everything": 50},
    "masked_squares (short, unaligned)": {"everything": 40},
    "masked_squares (long)": {"everything": 32},
    "masked_squares (long, unaligned)": {"everything": 32},
    "dense_squares (dense)": {"everything": 26},
    "dense_squares (dense, unaligned)": {"everything": 28},
}
SLACK = 8  # they are given out in eights
AMD_REGISTERS = 128  # of 512: four waves on each unit


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


def check_accesses(launch: Launch, read: Counter[int], written: Counter[int]) -> None:
    """Weights come as wide as a thread has them side by side, up to 16 bytes, or else one by one. Besides,
    there are bytes of the mask (8 bits), the table (64) and numbers (32), nothing of which is written."""
    bits = 8 * launch.size
    width = min(bits * launch.weights, 128) if launch.aligned else bits
    reads, writes = (streams * bits * launch.weights // width for streams in launch.streams)
    if writes:
        assert written == {width: writes}
    else:
        assert written in ({32: 2}, {64: 1})  # a sum and its error
    if width in (32, 64):
        assert reads <= read[width] <= reads + (NUMBERS if width == 32 else ADDRESSES)
    else:
        assert read[width] == reads
    assert set(read) <= {width, 8, 32, 64}
    assert read[64] <= ADDRESSES or width == 64
    assert read[32] <= NUMBERS or width == 32


@each_target
@each_variant
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_are_accessed_by_vectors(target: str, dtype: torch.dtype, setting: str, shape: str) -> None:
    """A predicate that differs within 16 bytes, or rows that are not known to be aligned, would make eight
    accesses of one or two."""
    for launch in launches(target, dtype, setting):
        if launch.shape == shape:
            check_accesses(launch, *accesses_in(launch.assembly(target), target))


@needs_cuobjdump
@each_nvidia
@pytest.mark.parametrize(("dtype", "setting"), [(torch.float32, "everything"), (torch.float16, "momentum")])
def test_the_assembler_keeps_the_vectors(
    target: str, dtype: torch.dtype, setting: str, tmp_path: Path
) -> None:
    for launch in launches(target, dtype, setting):
        if launch.shape in ("short", "long"):
            (code,) = opcodes(launch.cubin(tmp_path)).values()
            check_accesses(launch, accesses(code, "LDG"), accesses(code, "STG"))
            assert accesses(code, "LDG")[8] == 2 * launch.mask_bytes  # to count the fan-in, and the next tile
            assert not float64(code)


@each_target
@each_variant
def test_there_is_no_double_precision(target: str, dtype: torch.dtype, setting: str) -> None:
    """Most GPUs compute in it at a 64th of the speed."""
    instruction = r"\.f64\b" if target in NVIDIA else r"\bv_\w*f64"
    for launch in launches(target, dtype, setting):
        assert not re.findall(instruction, launch.assembly(target)), launch.name


@needs_cuobjdump
@each_nvidia
@each_variant
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


@pytest.mark.parametrize("target", AMD)
@each_variant
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
        assert taken["vgpr_spill_count"] == taken["sgpr_spill_count"] == 0, launch.name
        assert taken["vgpr_count"] <= AMD_REGISTERS, launch.name


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


@pytest.mark.parametrize("name", OTHER_NUMBERS)
def test_another_hyperparameter_is_the_same_kernel(name: str) -> None:
    """Learning rates change with every step. 1 and 16 are what Triton would compile anew for, as integers."""
    setting = "everything" if name.startswith(("ham", "max_grad_norm")) else "momentum"
    one = launches("sm_90", torch.float32, setting)
    other = {name: OTHER_NUMBERS[name]}
    another = launches_of_a_step(TARGETS["sm_90"], torch.float32, list(SHAPES), SETTINGS[setting], **other)
    assert [launch.compiled for launch in one] == [launch.compiled for launch in another]


def test_integers_would_be_another_kernel() -> None:
    """That the test above can fail."""

    def with_an_integer(rule: Rule) -> backend.RuleArgument:
        return argument(rule)._replace(weight_decay=int(rule.weight_decay))

    argument = backend._argument
    with mock.patch.object(backend, "_argument", with_an_integer):
        kernels = {
            launch.compiled
            for decay in (1.0, 2.0)
            for launch in launches_of_a_step(
                TARGETS["sm_90"], torch.float32, ["long"], SETTINGS["sgd"], weight_decay=decay
            )
        }
    assert len(kernels) == 2


MUTATIONS = {
    "a predicate per weight": (
        "live = (byte != 0)[:, :, None] & (column < shape.columns)\n"
        "        e = (row * shape.columns)[:, None, None] + column\n"
        "        _update",
        "live = active & (column < shape.columns)\n"
        "        e = (row * shape.columns)[:, None, None] + column\n"
        "        _update",
    ),
    "addresses of unknown alignment": (
        "p, b, g = tl.multiple_of(p, 16), tl.multiple_of(b, 16), tl.multiple_of(g, 16)",
        "pass",
    ),
    "rows of unknown alignment": (
        "columns = tl.multiple_of(columns, 128 // TYPE.primitive_bitwidth)",
        "pass",
    ),
    "double precision": (
        "p = tl.load(at.p + e, mask=live, other=0.0).to(tl.float32)",
        "p = tl.load(at.p + e, mask=live, other=0.0).to(tl.float64)",
    ),
}


def module_of(source: str, folder: Path) -> ModuleType:
    """A module of ``source``, in a file, where Triton looks for the text of its kernels."""
    path = folder / "mutant.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("mutant", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_worse_kernel_is_noticed(name: str, tmp_path: Path) -> None:
    """The checks above fail for kernels with what they look for."""
    old, new = MUTATIONS[name]
    source = Path(str(triton_step.__file__)).read_text()
    assert source.count(old) == 1
    with mock.patch.object(backend, "triton_step", module_of(source.replace(old, new), tmp_path)):
        (launch,) = launches_of_a_step(TARGETS["sm_90"], torch.float32, ["long"], SETTINGS["momentum"])
    ptx = launch.assembly("sm_90")
    if name == "double precision":
        assert ".f64" in ptx
    else:
        with pytest.raises(AssertionError):
            check_accesses(launch, *accesses_in(ptx, "sm_90"))


@needs_cuobjdump
def test_spills_are_noticed(tmp_path: Path) -> None:
    """A tile that is too large for the registers."""
    with mock.patch.object(triton_plan, "_LONG", {"ROWS": 1, "BYTES": 2048}):
        (launch,) = launches_of_a_step(TARGETS["sm_90"], torch.float32, ["long"], SETTINGS["momentum"])
    (taken,) = usage(launch.cubin(tmp_path)).values()
    assert taken["STACK"] + taken["LOCAL"] > 0
