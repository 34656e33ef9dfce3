"""Loops in machine code, and the shortest way around one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from machine_code import Instruction
from machine_listings import code
from machine_paths import loops, outermost, shortest_round

# A loop from 0x10 to 0xc0, in which there are a variant with a loop of its own, and jumps over one store.
LISTING = code(
    "S2R R0",
    "LDG.E R1",  # 0x10
    "@P0 BRA 0x70",
    "FADD R1",  # 0x30
    "FMUL R1",
    "FMUL R1",
    "@!P1 BRA 0x40",  # 0x60
    "ISETP P2",  # 0x70
    "BRA P3, 0xb0",
    "BRA.DIV UR4, 0xb0",  # 0x90
    "STG.E R1",
    "STG.E R2",  # 0xb0
    "@P2 BRA 0x10",
    "EXIT",
)
BEGIN = 0x10


def is_a(opcode: str) -> Callable[[Instruction], bool]:
    return lambda instruction: instruction.opcode.startswith(opcode)


def addresses(way: Sequence[Instruction]) -> list[int]:
    return [instruction.address for instruction in way]


def test_loops() -> None:
    spans = [(own[0].address, own[-1].address) for own in loops(LISTING)]
    assert spans == [(0x40, 0x60), (0x10, 0xC0)]
    (outer,) = outermost(loops(LISTING))
    assert (outer[0].address, outer[-1].address) == (0x10, 0xC0)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({}, [0x10, 0x20, 0x70, 0x80, 0xB0, 0xC0]),
        ({"LDG": 1}, [0x10, 0x20, 0x70, 0x80, 0xB0, 0xC0]),
        ({"FADD": 1}, [0x10, 0x20, 0x30, 0x40, 0x50, 0x60, 0x70, 0x80, 0xB0, 0xC0]),
        ({"FMUL": 3}, [0x10, 0x20, 0x30, *2 * [0x40, 0x50, 0x60], 0x70, 0x80, 0xB0, 0xC0]),
        ({"BRA.DIV": 1}, [0x10, 0x20, 0x70, 0x80, 0x90, 0xB0, 0xC0]),
        ({"STG": 2}, [0x10, 0x20, 0x70, 0x80, 0x90, 0xA0, 0xB0, 0xC0]),
    ],
    ids=["anything", "what all have", "a variant", "an inner loop", "a jump in between", "both stores"],
)
def test_the_shortest_way(wanted: dict[str, int], expected: list[int]) -> None:
    way = shortest_round(LISTING, BEGIN, {is_a(opcode): count for opcode, count in wanted.items()})
    assert addresses(way) == expected


def test_no_way() -> None:
    for opcode, count in (("MUFU.RCP", 1), ("S2R", 1), ("LDG", 2), ("EXIT", 1)):
        with pytest.raises(ValueError, match="no way around the loop"):
            shortest_round(LISTING, BEGIN, {is_a(opcode): count})


def test_more_jumps_and_fewer_instructions() -> None:
    listing = code(
        "@P0 BRA 0x50", "FADD R0", "FADD R1", "FADD R2", "BRA 0x90",
        "NOP", "BRA 0x80", "NOP", "BRA 0x90",
        "STG.E R0", "@P2 BRA 0x0",
    )  # fmt: skip
    assert addresses(shortest_round(listing, 0, {})) == [0x0, 0x50, 0x60, 0x80, 0x90, 0xA0]
    assert addresses(shortest_round(listing, 0, {is_a("NOP"): 0, is_a("FADD"): 1}))[1] == 0x10


def test_a_jump_that_is_always_made() -> None:
    """What is behind it is on no way."""
    listing = code("IADD3 R0", "BRA 0x30", "FADD R1", "STG.E R1", "@P0 BRA 0x0")
    (loop,) = loops(listing)
    assert loop == listing
    assert addresses(shortest_round(listing, 0, {})) == [0x0, 0x10, 0x30, 0x40]
    with pytest.raises(ValueError, match="no way around the loop"):
        shortest_round(listing, 0, {is_a("FADD"): 1})


def test_parts_of_a_loop_that_lie_behind_it() -> None:
    listing = code("LDG.E R0", "@P0 BRA 0x50", "STG.E R0", "@P1 BRA 0x0", "EXIT", "FADD R0", "BRA 0x20")
    way = shortest_round(listing, 0, {is_a("FADD"): 1})
    assert addresses(way) == [0x0, 0x10, 0x50, 0x60, 0x20, 0x30]


@pytest.mark.parametrize("rare", ["CALL.REL.NOINC 0x60", "EXIT", "RET.REL.NODEC R2"])
def test_what_leaves_the_loop_is_on_no_way(rare: str) -> None:
    """It would be the shorter one."""
    listing = code("LDG.E R0", "@P0 BRA 0x40", "FADD R1", "BRA 0x50", rare, "@P1 BRA 0x0", "NOP")
    assert addresses(shortest_round(listing, 0, {})) == [0x0, 0x10, 0x20, 0x30, 0x50]
    if rare == "EXIT":  # depending on something
        listing[4] = listing[4]._replace(predicate="@P2")
        assert addresses(shortest_round(listing, 0, {})) == [0x0, 0x10, 0x40, 0x50]


@pytest.mark.parametrize("jump", ["BRX R2 -0x40", "JMP 0x10", "BRA 0x990"])
def test_where_a_jump_leads_must_be_known(jump: str) -> None:
    with pytest.raises(ValueError, match="leads is not known"):
        shortest_round(code("LDG.E R0", jump, "@P1 BRA 0x0"), 0, {})
