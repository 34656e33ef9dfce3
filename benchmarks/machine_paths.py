"""The ways that a GPU may take through machine code: its loops, and the shortest way around one of them."""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from machine_code import Instruction

Code = Sequence[Instruction]


def loops(code: Code) -> list[Code]:
    """From where a branch leads back to, up to the branch."""
    position = {instruction.address: i for i, instruction in enumerate(code)}
    jumps = [(own.jumps_to(), i) for i, own in enumerate(code)]
    return [code[position[to] : i + 1] for to, i in jumps if to in position and position[to] < i]


def outermost(found: Sequence[Code]) -> list[Code]:
    """The loops that are in none of the others."""
    spans = [(own[0].address, own[-1].address) for own in found]
    return [
        own
        for own, (a, b) in zip(found, spans, strict=True)
        if not any(c <= a and b <= d and (a, b) != (c, d) for c, d in spans)
    ]


def shortest_round(loop: Code, wanted: Mapping[Callable[[Instruction], bool], int]) -> list[Instruction]:
    """The fewest instructions from a loop's beginning back to it, among which are as many as wanted.

    Of a warp all of whose threads go the same way. An instruction counts whether its predicate holds or not:
    it is issued.

    Raises:
        ValueError: no way around has them all.
    """
    blocks = _blocks(loop)
    limits = tuple(wanted.values())
    counts = {
        at: tuple(sum(map(is_wanted, block.code)) for is_wanted in wanted) for at, block in blocks.items()
    }
    begin = loop[0].address
    # Dijkstra's way: of those that end with a block and have so many of what is wanted, the shortest.
    first = begin, tuple(map(min, counts[begin], limits))
    queue = [(len(blocks[begin].code), first)]
    lengths, before = {first: len(blocks[begin].code)}, {first: first}
    while queue:
        length, state = heapq.heappop(queue)
        if length > lengths[state]:
            continue
        at, had = state
        for to in blocks[at].next:
            if to == begin and had == limits:
                way = [state]
                while way[-1] != first:
                    way.append(before[way[-1]])
                return [instruction for at, _ in reversed(way) for instruction in blocks[at].code]
            if to == begin or to not in blocks:
                continue
            following = to, tuple(map(min, map(sum, zip(had, counts[to], strict=True)), limits))
            longer = length + len(blocks[to].code)
            if longer < lengths.get(following, longer + 1):
                lengths[following], before[following] = longer, state
                heapq.heappush(queue, (longer, following))
    raise ValueError(f"no way around the loop has {limits} of what is wanted")


class _Block(NamedTuple):
    """Instructions that follow each other, and the addresses of those that may come next."""

    code: Code
    next: list[int]


def _blocks(code: Code) -> dict[int, _Block]:
    """By address. A call is taken to come back."""
    starts = {0, len(code)}
    next_of: dict[int, list[int]] = {}
    position = {instruction.address: i for i, instruction in enumerate(code)}
    for i, own in enumerate(code):
        to = own.jumps_to()
        if to is None and own.opcode.split(".")[0] not in ("EXIT", "RET"):
            continue
        next_of[i] = [code[i + 1].address] if _may_go_on(own) and i + 1 < len(code) else []
        next_of[i] += [] if to is None else [to]
        starts |= {i + 1, *(position[at] for at in next_of[i] if at in position)}
    blocks = {}
    for begin, end in pairwise(sorted(starts)):
        follows = [code[end].address] if end < len(code) else []
        blocks[code[begin].address] = _Block(code[begin:end], next_of.get(end - 1, follows))
    return blocks


def _may_go_on(jump: Instruction) -> bool:
    """Whether a jump depends on something: its predicate, one among its operands, or its threads."""
    return bool(jump.predicate or ".DIV" in jump.opcode or re.match(r"\s*!?U?P\d", jump.operands))
