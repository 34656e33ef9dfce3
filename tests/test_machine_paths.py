"""Loops in machine code, and the shortest way around one."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from machine_code import Instruction
from machine_listings import code
from machine_paths import loops, outermost, shortest_round

# A loop from 0x10 to 0xb0, in which there are two variants, one of them a loop itself.
LISTING = code(
    "S2R R0",
    "LDG.E R1",  # 0x10
    "@P0 BRA 0x70",
    "FADD R1",  # 0x30
    "FMUL R1",
    "FMUL R1",
    "@!P1 BRA 0x40",  # 0x60
    "ISETP P2",  # 0x70
    "BRA P3, 0xa0",
    "BRA.DIV UR4, 0xa0",  # 0x90
    "STG.E R1",  # 0xa0
    "@P2 BRA 0x10",
    "EXIT",
)


def is_a(opcode: str) -> object:
    return lambda instruction: instruction.opcode.startswith(opcode)


def addresses(way: Sequence[Instruction]) -> list[int]:
    return [instruction.address for instruction in way]


def test_loops() -> None:
    spans = [(own[0].address, own[-1].address) for own in loops(LISTING)]
    assert spans == [(0x40, 0x60), (0x10, 0xB0)]
    (outer,) = outermost(loops(LISTING))
    assert (outer[0].address, outer[-1].address) == (0x10, 0xB0)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({}, [0x10, 0x20, 0x70, 0x80, 0xA0, 0xB0]),
        ({"LDG": 1}, [0x10, 0x20, 0x70, 0x80, 0xA0, 0xB0]),
        ({"FADD": 1}, [0x10, 0x20, 0x30, 0x40, 0x50, 0x60, 0x70, 0x80, 0xA0, 0xB0]),
        ({"FMUL": 3}, [0x10, 0x20, 0x30, *2 * [0x40, 0x50, 0x60], 0x70, 0x80, 0xA0, 0xB0]),
        ({"BRA.DIV": 1}, [0x10, 0x20, 0x70, 0x80, 0x90, 0xA0, 0xB0]),
    ],
    ids=["anything", "what all have", "a variant", "an inner loop", "a jump in between"],
)
def test_the_shortest_way(wanted: dict[str, int], expected: list[int]) -> None:
    _, outer = loops(LISTING)
    way = shortest_round(outer, {is_a(opcode): count for opcode, count in wanted.items()})  # type: ignore[misc]
    assert addresses(way) == expected


def test_no_way() -> None:
    _, outer = loops(LISTING)
    with pytest.raises(ValueError, match="no way around the loop"):
        shortest_round(outer, {lambda i: i.opcode == "MUFU.RCP": 1})


def test_a_jump_that_is_always_made() -> None:
    """What is behind it is on no way."""
    (loop,) = loops(code("IADD3 R0", "BRA 0x30", "FADD R1", "STG.E R1", "@P0 BRA 0x0"))
    assert addresses(shortest_round(loop, {})) == [0x0, 0x10, 0x30, 0x40]
    with pytest.raises(ValueError, match="no way around the loop"):
        shortest_round(loop, {lambda i: i.opcode == "FADD": 1})
