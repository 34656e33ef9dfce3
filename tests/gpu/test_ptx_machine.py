"""The machine that executes compiled kernels: it computes what PTX says, and finds what a GPU refuses."""

from __future__ import annotations

import re
import struct

import numpy as np
import pytest
import torch
from ptx.build import why_no_machine
from ptx.machine import Machine
from ptx.program import programs_of

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif(why_no_machine() is not None, reason=str(why_no_machine())),
]

KERNEL = """
.shared .align 4 .b8 room[256];
.visible .entry check(.param .u64 to, .param .u32 unused)
{{
  .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<9>; .reg .b64 %rd<9>;
  ld.param.u64 %rd1, [to]; mov.u32 %r1, %tid.x; mul.wide.u32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2;
  cvt.u32.u64 %r5, %rd2; mov.b32 %r4, room; add.s32 %r4, %r4, %r5; setp.lt.u32 %p1, %r1, 7; mov.u32 %r2, 1;
  {code}
  ret;
}}
"""


@pytest.fixture
def executed(machine: Machine):
    def run(code: str, to: np.ndarray, *, threads: int = 64, blocks: int = 1) -> dict[str, int]:
        """Execute a kernel on ``to``, and return its races."""
        (program,) = programs_of(KERNEL.format(code=code)).values()
        own = to.ctypes.data
        parameters = struct.pack("<QI", own, 0)
        memory = [(own, to.nbytes)]
        return dict(machine.run(program, parameters, blocks=blocks, threads=threads, memory=memory))

    return run


def words(count: int = 64) -> np.ndarray:
    # At an address that is a multiple of 16 bytes, whatever NumPy thinks of it.
    memory = np.zeros(count + 4, np.uint32)
    start = -memory.ctypes.data % 16 // 4
    return memory[start : start + count]


# ---- what a GPU would refuse ------------------------------------------------------------------------

ILLEGAL = {
    "st.global.u32 [%rd3+4], %r1;": "an address outside of live memory, by thread 63 of block 0",
    "ld.global.u32 %r2, [%rd3+-4];": "an address outside of live memory, by thread 0",
    "st.global.u32 [%rd3+2], %r1;": "a misaligned address, by thread 0",
    "ld.global.v2.u32 {%r2, %r3}, [%rd3];": "a misaligned address, by thread 1",
    "mov.u64 %rd4, 0; ld.global.u32 %r2, [%rd4+-4];": "an address outside of live memory",
    "st.shared.u32 [%r4+4], %r1;": "an address outside of shared memory, by thread 63",
    "st.shared.u32 [%r4+-4], %r1;": "an address outside of shared memory, by thread 0",
    "ld.param.u32 %r2, [to+-4];": "no such parameter",
    "ld.param.u32 %r2, [unused+8];": "no such parameter",
    "@%p1 shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;": "its mask is not that of the lanes that are there",
    "@%p1 redux.sync.add.s32 %r2, %r1, -1;": "its mask is not that of the lanes that are there",
    "@%p1 vote.sync.ballot.b32 %r2, %p1, -1;": "its mask is not that of the lanes that are there",
    "@%p1 bar.warp.sync -1;": "its mask is not that of the lanes that are there",
    "@%p1 bar.sync 0;": "a barrier that not all threads of a block reach",
    "setp.lt.u32 %p2, %r1, 32; @%p2 bra LATER; bar.sync 0; LATER:": "a barrier that not all threads",
    "AGAIN: bra AGAIN;": "it does not end",
}


@pytest.mark.parametrize("code", ILLEGAL, ids=ILLEGAL.values())
def test_what_a_gpu_would_refuse(machine: Machine, executed, code: str) -> None:
    with pytest.raises(machine.Illegal, match=ILLEGAL[code]):
        executed(code, words())


@pytest.mark.parametrize(
    "code", ["atom.global.add.u32 %r2, [%rd1], 1", "setp.eq.s32 %p2|%p3, %r1, 1", "bar.sync 1"]
)
def test_an_instruction_that_is_not_known_is_named(executed, code: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"an instruction that is not known: {code}")):
        executed(f"{code};", words())


def test_a_name_that_is_not_known(executed) -> None:
    with pytest.raises(ValueError, match=r"invalid literal.*nowhere"):
        executed("mov.u32 %r2, nowhere;", words())


# ---- what nothing orders ----------------------------------------------------------------------------

OTHERS = "xor.b32 %r6, %r4, 128; "  # the place of a thread of the other warp
NEXT = "xor.b32 %r6, %r4, 4; "  # of another thread of the warp
RACES = {
    "st.global.u32 [%rd1], %r1;": "write of what another lane wrote",
    "ld.global.u32 %r2, [%rd1]; st.global.u32 [%rd3], %r2;": "write of what another lane read",
    "st.global.u32 [%rd3], %r2; ld.global.u32 %r2, [%rd1];": "read of what another lane wrote",
    "st.global.u32 [%rd3], %r2; bar.sync 0; ld.global.u32 %r2, [%rd1];": "read of what another lane wrote",
    "ld.global.nc.u32 %r2, [%rd3]; st.global.u32 [%rd3], %r2;": "write of what was read as constant",
    "st.global.u32 [%rd3], %r2; ld.global.nc.u32 %r2, [%rd3];": "read as constant",
    f"{OTHERS} st.shared.u32 [%r4], %r1; ld.shared.u32 %r2, [%r6];": "read of what another lane wrote",
    f"{OTHERS} st.shared.u32 [%r4], %r1; bar.warp.sync -1; ld.shared.u32 %r2, [%r6];": "read of what",
    f"{OTHERS} ld.shared.u32 %r2, [%r6]; st.shared.u32 [%r4], %r1;": "write of what another lane read",
    f"{NEXT} st.shared.u32 [%r4], %r1; ld.shared.u32 %r2, [%r6];": "read of what another lane wrote",
    # Of its readers, one is of the other warp.
    f"{NEXT} ld.shared.u32 %r2, [%r4]; ld.shared.u32 %r2, [%r6]; {OTHERS} ld.shared.u32 %r2, [%r6];"
    f"bar.warp.sync -1; {NEXT} st.shared.u32 [%r6], %r1;": "write of what another lane read",
}


@pytest.mark.parametrize("code", RACES, ids=map(str, range(len(RACES))))
def test_races(executed, code: str) -> None:
    assert any(race.startswith(RACES[code]) for race in executed(code, words()))


ORDERED = {
    "each its own": "st.global.u32 [%rd3], %r1; ld.global.u32 %r2, [%rd3]; st.global.u32 [%rd3], %r2;",
    "all read": "ld.global.u32 %r2, [%rd1]; ld.global.nc.u32 %r2, [%rd1];",
    "a barrier of the block": f"{OTHERS} st.shared.u32 [%r4], %r1; bar.sync 0; ld.shared.u32 %r2, [%r6];"
    "bar.sync 0; st.shared.u32 [%r4], %r2;",
    "a barrier of the warp": f"{NEXT} st.shared.u32 [%r4], %r1; bar.warp.sync -1; ld.shared.u32 %r2, [%r6];"
    "bar.warp.sync -1; st.shared.u32 [%r4], %r2;",
}


@pytest.mark.parametrize("code", ORDERED.values(), ids=ORDERED)
def test_no_races(executed, code: str) -> None:
    assert executed(code, words()) == {}


def test_blocks_race(executed) -> None:
    """Of two blocks, each thread writes where one of the other does."""
    code = "st.global.u32 [%rd3], %r1;"
    assert executed(code, words(), blocks=1) == {}
    assert [*executed(code, words(), blocks=2).values()] == [256]


# ---- what instructions compute ----------------------------------------------------------------------

FLOATS = {"1": "0f3F800000", "-1": "0fBF800000", "3": "0f40400000", "nan": "0f7FC00000", "inf": "0f7F800000"}
COMPUTED = {
    # The code, and what it leaves in %r2.
    "shr.s32 %r2, -8, 1;": -4,
    "shr.u32 %r2, -8, 1;": 0x7FFFFFFC,
    "shr.s32 %r2, -8, 40;": -1,
    "shl.b32 %r2, 1, 32;": 0,
    "mul.lo.s32 %r2, 65537, 65537;": 131073,
    "mul.wide.s32 %rd4, -2, 3; cvt.u32.u64 %r2, %rd4;": -6,
    "mul.wide.u32 %rd4, -1, -1; shr.u64 %rd4, %rd4, 32; cvt.u32.u64 %r2, %rd4;": -2,
    "mad.wide.s32 %rd4, -2, 3, 10; cvt.u32.u64 %r2, %rd4;": 4,
    "div.s32 %r2, -7, 2;": -3,
    "div.u32 %r2, -7, 2;": 0x7FFFFFFC,
    "min.s32 %r2, -1, 1;": -1,
    "max.s32 %r2, -1, 1;": 1,
    "add.s16x2 %r2, 0xFFFFFFFF, 0x00010002;": 1,
    "bfe.u32 %r2, 0xABCD, 4, 8;": 0xBC,
    "bfe.s32 %r2, 0xABCD, 4, 8;": 0xBC - 256,
    "bfe.u32 %r2, 5, 0, 0;": 0,
    "bfi.b32 %r2, 0xF, 0x12345678, 8, 4;": 0x12345F78,
    "prmt.b32 %r2, 0x33221100, 0x77665544, 0x7250;": 0x77225500,
    "prmt.b32 %r2, 0x80FF0180, 0, 0xBA98;": 0xFFFF00FF - 2**32,
    "popc.b32 %r2, 0xF0F;": 8,
    "not.b32 %r2, 0;": -1,
    "cvt.u16.u32 %rs1, 0x12345; cvt.u32.u16 %r2, %rs1;": 0x2345,
    "mov.b32 {%rs1, %rs2}, 0x12345678; mov.b32 %r2, {%rs2, %rs1};": 0x56781234,
    "mov.b64 %rd4, {%r2, %r1}; mov.b64 {%r3, %r2}, %rd4;": 0,
    "cvt.rzi.s32.f32 %r2, 0fC0200000;": -2,
    "cvt.rzi.s32.f32 %r2, 0f7FC00000;": 0,
    "cvt.rzi.s64.f32 %rd4, 0f7FC00000; shr.u64 %rd4, %rd4, 32; cvt.u32.u64 %r2, %rd4;": -(2**31),
    "cvt.s8.s32 %r2, 200;": 200 - 256,
    "cvt.rzi.s32.f32 %r2, 0f4F800000;": 2**31 - 1,
    "selp.b32 %r2, 5, 6, %p1;": 5,
}


@pytest.mark.parametrize("code", COMPUTED)
def test_integers(executed, code: str) -> None:
    to = words(64)
    executed(f"{code} setp.eq.s32 %p2, %r1, 0; @%p2 st.global.u32 [%rd1], %r2;", to)
    assert int(to.view(np.int32)[0]) == COMPUTED[code]


def comparison(name: str, a: float, b: float) -> bool:
    """What PTX says of a comparison: with a u it is true of NaN, without it is false."""
    is_nan = np.isnan(a) or np.isnan(b)
    plain = name.rstrip("u")
    values = {"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}
    return bool(name.endswith("u") if is_nan else values[plain])


@pytest.mark.parametrize("name", [n + u for n in ("eq", "ne", "lt", "le", "gt", "ge") for u in ("", "u")])
def test_comparisons_of_floats(executed, name: str) -> None:
    to = words()
    for a, a_bits in FLOATS.items():
        for b, b_bits in FLOATS.items():
            executed(
                f"setp.{name}.f32 %p2, {a_bits}, {b_bits}; selp.b32 %r2, 1, 0, %p2;"
                "st.global.u32 [%rd3], %r2;",
                to,
            )
            assert bool(to[0]) == comparison(name, float(a), float(b)), (a, name, b)


def of_floats(executed, opcode: str, *operands: np.ndarray) -> np.ndarray:
    """What an instruction makes of 64 operands: 32 bits each."""
    memory = words(64 * (1 + len(operands)))
    for i, values in enumerate(operands):
        memory[64 * (1 + i) :][:64] = values.astype(np.float32).view(np.uint32)
    loads = " ".join(f"ld.global.b32 %r{6 + i}, [%rd3+{256 * (1 + i)}];" for i in range(len(operands)))
    names = ", ".join(f"%r{6 + i}" for i in range(len(operands)))
    executed(f"{loads} {opcode} %r2, {names}; st.global.b32 [%rd3], %r2;", memory)
    return memory[:64].copy()


@pytest.fixture
def numbers() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    drawn = [rng.standard_normal(64).astype(np.float32) for _ in range(3)]
    drawn[0][:6] = 0.0, -0.0, np.inf, -np.inf, 1e-40, 6e-6
    return drawn


def test_float_arithmetic(executed, numbers: list[np.ndarray]) -> None:
    a, b, c = numbers
    with np.errstate(all="ignore"):
        expected = {
            "add.rn.f32": a + b,
            "sub.rn.f32": a - b,
            "mul.rn.f32": a * b,
            "div.rn.f32": a / b,
            # Products of float32 are exact in float64, and the sum is nearly so.
            "fma.rn.f32": (a.astype(np.float64) * b + c).astype(np.float32),
            "sqrt.rn.f32": np.sqrt(np.abs(a)),
            "ex2.approx.f32": np.exp2(a.astype(np.float64)).astype(np.float32),
            "neg.f32": -a,
            "abs.f32": np.abs(a),
            "cvt.sat.f32.f32": np.clip(a, 0, 1),
        }
    operands = {"sqrt.rn.f32": (np.abs(a),), "fma.rn.f32": (a, b, c)}
    for opcode, values in expected.items():
        given = operands.get(
            opcode, (a, b) if opcode[3] == "." and opcode[:3] in ("add", "sub", "mul", "div") else (a,)
        )
        got = of_floats(executed, opcode, *given).view(np.float32)
        assert np.array_equal(got, values.astype(np.float32), equal_nan=True), opcode


def test_fma_rounds_down_where_it_is_told_to(executed, numbers: list[np.ndarray]) -> None:
    a, b, c = (np.abs(values) for values in numbers)
    a[:6] = 1.5
    exact = a.astype(np.float64) * b + c
    down = of_floats(executed, "fma.rm.f32", a, b, c).view(np.float32)
    nearest = of_floats(executed, "fma.rn.f32", a, b, c).view(np.float32)
    assert (down <= exact).all()
    assert (np.nextafter(down, np.float32(np.inf)) > exact).all()
    assert (down != nearest).any()


def test_half_precision(executed, numbers: list[np.ndarray]) -> None:
    """Rounded to the nearest number, the even one of two: NumPy's float16, and PyTorch's bfloat16."""
    ties = [2**-24, 2**-25, 3 * 2**-25, 1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8]
    values = numbers[0].copy()
    values[40:51] = [65504, 65519, 65520, 1e9, *ties]
    with np.errstate(all="ignore"):
        float16 = values.astype(np.float16).view(np.uint16)
    bfloat16 = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    for kind, expected in {"f16": float16, "bf16": bfloat16}.items():
        pairs = of_floats(executed, f"cvt.rn.{kind}x2.f32", values, values[::-1].copy())
        assert (pairs >> 16 == expected).all(), kind
        assert (pairs & 0xFFFF == expected[::-1]).all(), kind


def test_all_numbers_of_half_precision_are_widened(executed) -> None:
    for kind, dtype in {"f16": torch.float16, "bf16": torch.bfloat16}.items():
        bits = np.arange(2**16, dtype=np.uint32)
        memory = words(2**16)
        memory[:] = bits
        code = f"""mov.u32 %r6, %ctaid.x; mad.wide.u32 %rd4, %r6, 256, %rd3;
          ld.global.b16 %rs1, [%rd4]; cvt.f32.{kind} %r2, %rs1; st.global.b32 [%rd4], %r2;"""
        executed(code, memory, blocks=2**16 // 64)
        expected = torch.from_numpy(bits.astype(np.int32)).to(torch.uint16).view(dtype).float().numpy()
        assert np.array_equal(memory.view(np.float32), expected, equal_nan=True), kind


# ---- several lanes ----------------------------------------------------------------------------------

LANES = np.arange(64) % 32
SHUFFLES = {
    "shfl.sync.bfly.b32 %r2, %r1, 5, 31, -1;": LANES ^ 5,
    "shfl.sync.down.b32 %r2, %r1, 3, 31, -1;": np.where(LANES + 3 < 32, LANES + 3, LANES),
    "shfl.sync.up.b32 %r2, %r1, 3, 0, -1;": np.where(LANES >= 3, LANES - 3, LANES),
    "shfl.sync.idx.b32 %r2, %r1, 7, 31, -1;": np.full(64, 7),
    # Within parts of 8 lanes.
    "shfl.sync.down.b32 %r2, %r1, 3, 6175, -1;": np.where(LANES % 8 + 3 < 8, LANES + 3, LANES),
    "shfl.sync.idx.b32 %r2, %r1, 2, 6175, -1;": LANES // 8 * 8 + 2,
}


@pytest.mark.parametrize("code", SHUFFLES)
def test_shuffles(executed, code: str) -> None:
    to = words()
    executed(f"{code} st.global.u32 [%rd3], %r2;", to)
    assert (to == SHUFFLES[code] + np.arange(64) // 32 * 32).all()


def test_sums_and_votes(executed) -> None:
    for code, first, second in (
        ("redux.sync.add.s32 %r2, %r1, -1;", sum(range(32)), sum(range(32, 64))),
        ("redux.sync.max.s32 %r2, %r1, -1;", 31, 63),
        ("vote.sync.ballot.b32 %r2, %p1, -1;", 127, 0),
    ):
        to = words()
        executed(f"{code} st.global.u32 [%rd3], %r2;", to)
        assert (to == np.repeat([first, second], 32)).all()


def test_lanes_part_and_meet_again(executed) -> None:
    code = """
      @%p1 bra FIRST;
      add.s32 %r2, %r2, 10; bra AGAIN;
      FIRST: add.s32 %r2, %r2, 20;
      AGAIN: shfl.sync.idx.b32 %r3, %r2, 0, 31, -1; add.s32 %r2, %r2, %r3; st.global.u32 [%rd3], %r2;
    """
    to = words()
    executed(code, to)
    assert (to == [42] * 7 + [32] * 25 + [22] * 32).all()


MATRICES = np.arange(4 * 8 * 8).reshape(4, 8, 8)  # four of eight rows of eight numbers of two bytes
OF_LANES = MATRICES.reshape(4, 32, 2).swapaxes(0, 1)  # each lane has two numbers of each matrix
OWN = """.shared .align 16 .b8 wide[512]; mul.wide.u32 %rd4, %r1, 16; add.s64 %rd4, %rd4, %rd1;
  shl.b32 %r4, %r1, 4; mov.b32 %r6, wide; add.s32 %r4, %r4, %r6;
  ld.global.v4.b32 {%r6, %r7, %r8, %r3}, [%rd4];"""


@pytest.mark.parametrize(
    ("given", "code", "expected"),
    [
        (
            MATRICES,
            "st.shared.v4.b32 [%r4], {%r6, %r7, %r8, %r3}; bar.sync 0;"
            "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r6, %r7, %r8, %r3}, [%r4];",
            OF_LANES,
        ),
        (
            MATRICES.swapaxes(1, 2),
            "st.shared.v4.b32 [%r4], {%r6, %r7, %r8, %r3}; bar.sync 0;"
            "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%r6, %r7, %r8, %r3}, [%r4];",
            OF_LANES,
        ),
        (
            OF_LANES,
            "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r4], {%r6, %r7, %r8, %r3}; bar.sync 0;"
            "ld.shared.v4.b32 {%r6, %r7, %r8, %r3}, [%r4];",
            MATRICES,
        ),
    ],
    ids=["load", "transposed", "store"],
)
def test_matrices(executed, given: np.ndarray, code: str, expected: np.ndarray) -> None:
    """Lane i has the address of row i of the four."""
    to = words(32 * 4)
    to[:] = given.astype(np.uint16).reshape(-1).view(np.uint32)
    executed(f"{OWN} {code} st.global.v4.b32 [%rd4], {{%r6, %r7, %r8, %r3}};", to, threads=32)
    assert (to.view(np.uint16) == expected.reshape(-1)).all()


# ---- the text ---------------------------------------------------------------------------------------


def test_parameters_lie_as_in_c() -> None:
    text = """.entry mixed(.param .u8 a, .param .u64 .ptr .global .align 1 b, .param .f32 c,
      .param .align 8 .b8 d[24], .param .u16 e) { ret; }"""
    program = programs_of(text)["mixed"]
    assert [tuple(parameter) for parameter in program.parameters] == [
        (0, 1),
        (8, 8),
        (16, 4),
        (24, 24),
        (48, 2),
    ]
    assert program.parameter_nbytes == 50


def test_a_block_has_whole_warps(executed) -> None:
    with pytest.raises(ValueError, match="whole warps"):
        executed("", words(), threads=33)


def test_blocks_of_memory_may_overlap(machine: Machine) -> None:
    (program,) = programs_of(KERNEL.format(code="st.global.u32 [%rd3], %r1;")).values()
    to = words(32)
    begin = to.ctypes.data
    blocks = [(begin, 64), (begin + 4, 8), (begin + 32, 96), (begin, 16)]
    machine.run(program, struct.pack("<QI", begin, 0), blocks=1, threads=32, memory=blocks)
    assert (to == np.arange(32)).all()
    with pytest.raises(machine.Illegal, match="outside of live memory"):
        machine.run(program, struct.pack("<QI", begin + 4, 0), blocks=1, threads=32, memory=blocks)


def test_tensors_without_memory_do_not_matter(machine: Machine) -> None:
    """And views of one array are one block."""
    array = np.zeros(64, np.uint32)
    views = [torch.from_numpy(array.view(np.int32))[1:], torch.from_numpy(array.view(np.int32)[:8])]
    lazy = torch.nn.LazyLinear(3)
    (program,) = programs_of(KERNEL.format(code="ld.global.u32 %r2, [%rd1];")).values()
    machine.run(program, struct.pack("<QI", array.ctypes.data, 0), blocks=1, threads=32)
    del views, lazy
