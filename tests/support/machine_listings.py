"""Machine code as ``machine_code`` reads it, written down."""

from __future__ import annotations

from machine_code import Instruction


def code(*lines: str) -> list[Instruction]:
    """``@P0 BRA 0x20`` and the like; each takes 16 bytes."""
    found = []
    for i, line in enumerate(lines):
        predicate, rest = line.split(" ", 1) if line.startswith("@") else ("", line)
        opcode, _, operands = rest.partition(" ")
        found.append(Instruction(16 * i, predicate, opcode, operands))
    return found
