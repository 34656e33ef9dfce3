"""Control flow of GPU machine code: the loops, and the shortest way around a loop."""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from machine_code import Instruction

Code = Sequence[Instruction]


def loops(code: Code) -> list[Code]:
    """Return the loops: the instructions from the target of each backward branch to the branch."""
    position = {instruction.address: i for i, instruction in enumerate(code)}
    jumps = [(own.jumps_to(), i) for i, own in enumerate(code)]
    return [code[position[to] : i + 1] for to, i in jumps if to in position and position[to] < i]


def outermost(found: Sequence[Code]) -> list[Code]:
    """Return the loops that are inside no other."""
    spans = [(own[0].address, own[-1].address) for own in found]
    return [
        own
        for own, (a, b) in zip(found, spans, strict=True)
        if not any(c <= a and b <= d and (a, b) != (c, d) for c, d in spans)
    ]


def shortest_round(
    code: Code, begin: int, wanted: Mapping[Callable[[Instruction], bool], int]
) -> list[Instruction]:
    """Return the shortest sequence of instructions from the beginning of a loop back to it that has the
    wanted ones.

    All threads of the warp are assumed to take the same way, without calls, which are for rare cases. A
    predicated instruction counts whether or not its predicate holds, because it is issued.

    Args:
        code: all of the function, because a compiler may put parts of a loop behind it.
        begin: the address of the loop.
        wanted: the least number of instructions for which each predicate is true.

    Raises:
        ValueError: no way around the loop has them all, or the target of a jump is not known.
    """
    blocks = _blocks(code)
    limits = tuple(wanted.values())
    counts = {
        at: tuple(sum(map(is_wanted, block.code)) for is_wanted in wanted) for at, block in blocks.items()
    }
    # Dijkstra's algorithm; a state is a block and the counts of wanted instructions so far.
    first = begin, tuple(map(min, counts[begin], limits))
    queue = [(len(blocks[begin].code), first)]
    before = {first: first}
    while queue:
        length, state = heapq.heappop(queue)
        at, had = state
        for to in blocks[at].next:
            if to == begin and had == limits:
                way = [state]
                while way[-1] != first:
                    way.append(before[way[-1]])
                return [instruction for at, _ in reversed(way) for instruction in blocks[at].code]
            if to == begin:
                continue
            following = to, tuple(map(min, map(sum, zip(had, counts[to], strict=True)), limits))
            if following not in before:
                before[following] = state
                heapq.heappush(queue, (length + len(blocks[to].code), following))
    raise ValueError(f"no way around the loop has {limits} of what is wanted")


class _Block(NamedTuple):
    """A basic block: its instructions, and the addresses of the blocks that may come next."""

    code: Code
    next: list[int]


_ENDS = ("EXIT", "RET", "CALL")
_UNKNOWN = ("BRX", "BRXU", "JMP", "JMX", "JMXU")


def _blocks(code: Code) -> dict[int, _Block]:
    """Return the basic blocks by address."""
    position = {instruction.address: i for i, instruction in enumerate(code)}
    starts = {0, len(code)}
    next_of: dict[int, list[int]] = {}
    for i, own in enumerate(code):
        to, opcode = own.jumps_to(), own.opcode.split(".")[0]
        if opcode in _UNKNOWN or (to is not None and to not in position):
            raise ValueError(f"where {own} leads is not known")
        if to is None and opcode not in _ENDS:
            continue
        next_of[i] = [code[i + 1].address] if _may_go_on(own) and i + 1 < len(code) else []
        next_of[i] += [] if to is None else [to]
        starts |= {i + 1, *(position[at] for at in next_of[i])}
    blocks = {}
    for begin, end in pairwise(sorted(starts)):
        follows = [code[end].address] if end < len(code) else []
        blocks[code[begin].address] = _Block(code[begin:end], next_of.get(end - 1, follows))
    return blocks


def _may_go_on(jump: Instruction) -> bool:
    """Tell if a jump is conditional: by its predicate, by one among its operands, or by divergence."""
    return bool(jump.predicate or ".DIV" in jump.opcode or re.match(r"\s*!?U?P\d", jump.operands))
