"""Takes a compiled kernel, as PTX, apart into instructions.

Names become numbers here: registers, labels, parameters and variables in shared memory.
"""

from __future__ import annotations

import re
from enum import IntEnum
from typing import NamedTuple


class Kind(IntEnum):
    """What the number of an operand is."""

    REGISTER = 0  # its index
    CONSTANT = 1  # its bits
    SPECIAL = 2  # an index of SPECIAL
    UNUSED = 3  # none: a result that nobody wants


SPECIAL = ("%tid.x", "%ntid.x", "%ctaid.x", "%nctaid.x", "%nctaid.y")


class Operand(NamedTuple):
    kind: Kind
    number: int


class Instruction(NamedTuple):
    opcode: str
    operands: list[list[Operand]]  # a vector has several; an address is a base and an offset
    guard: int  # the index of the predicate that says which lanes take part; -1: all do
    negated: bool  # whether those without it do
    text: str


class Parameter(NamedTuple):
    offset: int
    nbytes: int


class Program(NamedTuple):
    """A kernel."""

    name: str
    parameters: list[Parameter]
    instructions: list[Instruction]
    registers: list[int]  # the bytes of each; 0: a predicate
    shared_nbytes: int  # what a launch asks for comes after them

    @property
    def parameter_nbytes(self) -> int:
        return sum(self.parameters[-1]) if self.parameters else 0


def programs_of(text: str) -> dict[str, Program]:
    """Return the kernels of a PTX text by their names.

    Raises:
        ValueError: an operand is not known.
    """
    text = re.sub(r"//.*", "", text)
    text = re.sub(r"(?m)^\s*\.(loc|file|pragma)\b.*$", "", text)
    entries = re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)[^{]*\{", text, re.S)
    return {entry[1]: _Reader(text, entry).program() for entry in entries}


class _Reader:
    """Reads one kernel."""

    def __init__(self, text: str, entry: re.Match[str]) -> None:
        self._name = entry[1]
        self._body = _up_to_its_brace(text[entry.end() :])
        self._parameters = _parameters(entry[2])
        self._types = _register_nbytes(self._body)
        # Variables in shared memory are declared before all kernels, or in one.
        shared, self._shared_nbytes = _shared_variables(text[: text.index(".entry")] + self._body)
        self._symbols = {**shared, **{name: p.offset for name, p in self._parameters.items()}}
        self._registers: dict[str, int] = {}

    def program(self) -> Program:
        statements: list[str] = []
        for statement in self._body.split(";"):
            while label := re.match(r"[\s{}]*([$\w]+):", statement):
                self._symbols[label[1]] = len(statements)
                statement = statement[label.end() :]
            statement = " ".join(statement.split()).lstrip("{} ")
            if statement and not statement.startswith("."):
                statements.append(statement)
        return Program(
            name=self._name,
            parameters=[*self._parameters.values()],
            instructions=[self._instruction(statement) for statement in statements],
            registers=[self._types[_family(name)] for name in self._registers],
            shared_nbytes=self._shared_nbytes,
        )

    def _instruction(self, text: str) -> Instruction:
        parts = re.match(r"(?:@(!?)(%\w+)\s+)?(\S+)\s*(.*)$", text)
        assert parts is not None
        negated, guard, opcode, operands = parts.groups()
        return Instruction(
            opcode=opcode,
            operands=[self._operand(part.strip()) for part in re.split(r",(?![^{]*})", operands) if part],
            guard=-1 if guard is None else self._register(guard),
            negated=bool(negated),
            text=text,
        )

    def _operand(self, text: str) -> list[Operand]:
        if text.startswith("["):
            base, _, offset = text.strip("[] ").partition("+")
            return [self._single(base), self._single(offset or "0")]
        return [self._single(part) for part in re.split(r"[,|]", text.strip("{} "))]

    def _single(self, text: str) -> Operand:
        text = text.strip()
        if text == "_":
            return Operand(Kind.UNUSED, 0)
        if text in SPECIAL:
            return Operand(Kind.SPECIAL, SPECIAL.index(text))
        if _family(text) in self._types:
            return Operand(Kind.REGISTER, self._register(text))
        if text in self._symbols:
            return Operand(Kind.CONSTANT, self._symbols[text])
        return Operand(Kind.CONSTANT, _bits_of(text))

    def _register(self, name: str) -> int:
        return self._registers.setdefault(name, len(self._registers))


def _up_to_its_brace(text: str) -> str:
    depth = 1
    for brace in re.finditer(r"[{}]", text):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[: brace.start()]
    raise ValueError("a kernel does not end")


def _parameters(text: str) -> dict[str, Parameter]:
    """Return where each parameter is, in the order of their declaration."""
    found: dict[str, Parameter] = {}
    end = 0
    pattern = (
        r"\.param\s+(?:\.align\s+(\d+)\s+)?\.[a-z]+(\d+)\s+"
        r"(?:\.ptr\s[.\w\s]*?\.align\s+\d+\s+)?([\w$]+)(?:\[(\d+)\])?"
    )
    for alignment, bits, name, count in re.findall(pattern, text):
        nbytes = int(bits) // 8
        start = _next_multiple(end, int(alignment or nbytes))
        end = start + nbytes * int(count or 1)
        found[name] = Parameter(start, end - start)
    return found


def _register_nbytes(body: str) -> dict[str, int]:
    """Return the bytes of the registers of each family: those of ``%r`` are ``%r1``, ``%r2`` and so on."""
    found = {}
    for kind, names in re.findall(r"\.reg\s+\.(\w+)\s+([^;]*)", body):
        nbytes = 0 if kind == "pred" else int(kind.lstrip("bfsu")) // 8
        found.update({_family(re.sub(r"<\d+>", "", name)): nbytes for name in names.split(",")})
    return found


def _family(name: str) -> str:
    return name.strip().rstrip("0123456789")


def _shared_variables(text: str) -> tuple[dict[str, int], int]:
    """Return the offsets of variables in shared memory, and the bytes of those whose size is known."""
    offsets: dict[str, int] = {}
    end = 0
    for alignment, name, size in re.findall(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]", text):
        offsets[name] = end = _next_multiple(end, int(alignment))
        end += int(size or 0)
    return offsets, end


def _next_multiple(number: int, divisor: int) -> int:
    return -(-number // divisor) * divisor


def _bits_of(text: str) -> int:
    """Return the bits of a number: ``0f3F800000``, ``0d...``, or an integer."""
    if re.fullmatch(r"0[fFdD][0-9a-fA-F]+", text) and len(text) in (10, 18):
        return int(text[2:], 16)
    return int(text.rstrip("U"), 0) % 2**64
