"""The tables in device memory that GPU kernels read, and the launches over them.

Made when something moves, kept from step to step. No kernel is launched here, and nothing waits.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ...correction import Factors
from ..contract import ParamState
from ..memory import Rows, address_of
from .device import upload
from .lists import Sectors, sectors_in, tensor_of_programs, weights_per_sector

_RULES_PER_LAUNCH = 8  # they are arguments of the kernel, of which there are only so many
_ALIGNMENT = 16  # bytes, of the vectors in which memory is accessed
_WIDE = 2**31  # weights: they are numbered with 64 bits from here on


class Tiles(Protocol):
    """How the kernels of a backend share out work."""

    most_tensors: int  # of one launch
    chunk: int  # sectors that are visited at a time
    by_alignment: bool  # whether kernels must be told how memory is aligned, for all tensors of a launch

    def step_rows(self, columns: int) -> int:
        """How many neurons, of so many weights, a program updates."""


class Member(NamedTuple):
    """A parameter of a plan."""

    param: ParamState
    rows: Rows
    sectors: Sectors | None
    factors: Factors | None


class StepRow(NamedTuple):
    """The row of a tensor in the table that ``masked_step`` reads, as int64."""

    parameter: int
    momentum_buffer: int  # 0: none
    mask: int  # boolean
    divisor: int  # the address of what fan-in is divided by; 0: all c_i are 1
    rows: int
    columns: int
    first_program: int
    rule: int  # among those of its launch
    ham: int


class SectorRow(NamedTuple):
    """The row of a tensor in the table that the kernels that walk sectors read, as int64."""

    parameter: int
    momentum_buffer: int  # 0: none
    mask_bits: int  # of all its sectors; 0: it is dense
    listed: int  # of listed sectors; 0: all of them are visited
    visited_bits: int  # of the sectors that are visited
    factors: int  # c_i by rows; 0: all are 1
    columns: int
    elements: int
    rule: int  # among those of its launch
    ham: int
    first_chunk: int
    length: int  # of what is walked, in sectors


class StepLaunch(NamedTuple):
    """Tensors whose masks are new, to be updated neuron by neuron."""

    members: list[int]  # of the plan, as in the table
    dtype: torch.dtype  # of their weights
    aligned: bool  # all memory begins at whole 16 bytes, and so do all rows
    momentum: bool  # whether one of them has a buffer
    rules: slice  # of all rules
    table: Tensor  # int64 (members, columns of StepRow)
    program_to_tensor: Tensor  # int32 (programs,): the row of the table that each program reads
    programs: int


class SectorLaunch(NamedTuple):
    """Tensors that are visited, by chunks of their sectors.

    Only the device knows the number of chunks: it depends on which sectors are live. So a fixed number of
    programs share them out.
    """

    members: list[int]  # of the plan, as in the table
    dtype: torch.dtype  # of their weights
    aligned: bool  # parameters and momentum begin at whole 16 bytes, and no sector has parts of three rows
    momentum: bool  # whether one of them has a buffer
    rules: slice  # of all rules
    grads_aligned: bool  # gradients begin at whole 16 bytes, too
    wide: bool  # numbers of weights need 64 bits
    table: Tensor  # int64 (members, columns of SectorRow)
    chunk_to_tensor: Tensor  # int32 (most_chunks,): the row of the table that each chunk reads
    chunks: Tensor  # int64, 0-d: how many there are
    most_chunks: int


class _Variant(NamedTuple):
    """The properties that all tensors of a launch have in common."""

    is_new: bool
    aligned: bool
    grads_aligned: bool
    wide: bool
    first_rule: int


class Layout(NamedTuple):
    """The launches that suit gradients of certain alignments, for all tensors that have weights."""

    gradients_aligned: bytes  # of each gradient, 1 if it is at a multiple of 16 bytes
    launches: list[StepLaunch | SectorLaunch]
    nbytes: int  # of what was uploaded for it, at most

    def memory(self) -> list[Tensor]:
        return [t for launch in self.launches for t in launch if isinstance(t, Tensor)]


def lay_out(
    members: Sequence[Member], gradients_aligned: bytes, new: Collection[int], tiles: Tiles
) -> Layout:
    """Return the layout of a plan.

    Args:
        members: the plan's.
        gradients_aligned: see ``Layout``.
        new: the indices of those that are updated neuron by neuron.
        tiles: the backend's.
    """
    maker = _Maker(members, tiles)
    by_variant: dict[_Variant, list[int]] = {}
    for i, member in enumerate(members):
        if member.param.parameter.numel() > 0:
            variant = _variant(member, bool(gradients_aligned[i]), i in new)
            if not tiles.by_alignment:
                variant = variant._replace(aligned=True, grads_aligned=True)
            by_variant.setdefault(variant, []).append(i)
    launches: list[StepLaunch | SectorLaunch] = []
    for variant, indices in by_variant.items():
        make = maker.step_launch if variant.is_new else maker.sector_launch
        for at in range(0, len(indices), tiles.most_tensors):
            launches.append(make(variant, indices[at : at + tiles.most_tensors]))
    return Layout(gradients_aligned, launches, maker.nbytes)


class _Maker:
    """Makes launches, and sums up the bytes that it uploads for them."""

    def __init__(self, members: Sequence[Member], tiles: Tiles) -> None:
        self._members, self._tiles = members, tiles
        self._device = members[0].param.parameter.device
        self.nbytes = 0

    def step_launch(self, variant: _Variant, indices: list[int]) -> StepLaunch:
        table, programs, first = [], [], 0
        for i in indices:
            param, rows, _, factors = self._members[i]
            programs.append(-(-rows.rows // self._tiles.step_rows(rows.columns)))
            table.append(
                StepRow(
                    parameter=param.parameter.data_ptr(),
                    momentum_buffer=address_of(param.momentum_buffer),
                    mask=address_of(rows.mask),
                    divisor=0 if factors is None else factors.divisor.data_ptr(),
                    rows=rows.rows,
                    columns=rows.columns,
                    first_program=first,
                    rule=param.rule - variant.first_rule,
                    ham=int(param.ham),
                )
            )
            first += programs[-1]
        return StepLaunch(
            members=indices,
            **self._common(variant, indices),
            table=self._upload_table(table),
            program_to_tensor=self._upload(tensor_of_programs(programs)),
            programs=first,
        )

    def sector_launch(self, variant: _Variant, indices: list[int]) -> SectorLaunch:
        """Return the launch for some members. The host does not wait to know which sectors are live."""
        members = [self._members[i] for i in indices]
        sectors = [member.sectors for member in members]
        per_sector = weights_per_sector(members[0].param.parameter.dtype)
        whole = [sectors_in(member.param.parameter.numel(), per_sector) for member in members]
        capacity = [0 if s is None else s.listed.numel() for s in sectors]
        table = [
            (*_sector_row(member, variant), *own)
            for member, *own in zip(members, whole, capacity, strict=True)
        ]
        numbers = self._upload_table(table)
        rows = numbers[:, :-2].clone()
        _choose(rows, numbers[:, -2], numbers[:, -1], sectors)
        chunk = self._tiles.chunk
        chunks = (rows[:, _LENGTH] + (chunk - 1)) // chunk
        ends = chunks.cumsum(0)
        torch.sub(ends, chunks, out=rows[:, _FIRST_CHUNK])
        most = sum(-(-count // chunk) for count in whole)
        chunk_to_tensor = torch.searchsorted(
            ends, torch.arange(most, device=self._device), right=True, out_int32=True
        )
        return SectorLaunch(
            members=indices,
            **self._common(variant, indices),
            grads_aligned=variant.grads_aligned,
            wide=variant.wide,
            table=rows,
            chunk_to_tensor=chunk_to_tensor,
            chunks=ends[-1].clone(),
            most_chunks=most,
        )

    def _common(self, variant: _Variant, indices: Sequence[int]) -> dict[str, Any]:
        """Return the fields that launches of both kinds have."""
        params = [self._members[i].param for i in indices]
        return {
            "dtype": params[0].parameter.dtype,
            "aligned": variant.aligned,
            "momentum": any(param.momentum_buffer is not None for param in params),
            "rules": slice(variant.first_rule, variant.first_rule + _RULES_PER_LAUNCH),
        }

    def _upload_table(self, rows: Sequence[tuple[int, ...]]) -> Tensor:
        return self._upload(torch.tensor(rows, dtype=torch.int64, device="cpu"))

    def _upload(self, values: Tensor) -> Tensor:
        self.nbytes += values.nbytes + _ALIGNMENT
        return upload(values, self._device)


def _sector_row(member: Member, variant: _Variant) -> SectorRow:
    param, rows, sectors, factors = member
    return SectorRow(
        parameter=param.parameter.data_ptr(),
        momentum_buffer=address_of(param.momentum_buffer),
        mask_bits=0 if sectors is None else sectors.mask_bits.data_ptr(),
        listed=0 if sectors is None else sectors.listed.data_ptr(),
        visited_bits=0 if sectors is None else sectors.listed_bits.data_ptr(),
        factors=0 if factors is None else factors.c.data_ptr(),
        columns=rows.columns,
        elements=param.parameter.numel(),
        rule=param.rule - variant.first_rule,
        ham=int(param.ham),
        first_chunk=0,  # this and the next are written on the device
        length=0,
    )


def are_aligned(addresses: bytes) -> bytes:
    """Return, for each address of 8 bytes, 1 if it is a multiple of 16, else 0."""
    return addresses[_LOWEST::8].translate(_IS_ALIGNED)


_LOWEST = 0 if sys.byteorder == "little" else 7
_IS_ALIGNED = bytes(byte % _ALIGNMENT == 0 for byte in range(256))


def _variant(member: Member, gradient_aligned: bool, is_new: bool) -> _Variant:
    param, rows = member.param, member.rows
    together = param.parameter.data_ptr() | address_of(param.momentum_buffer)
    if is_new:
        together |= rows.columns * param.parameter.itemsize
    # In a sector there are parts of two rows at most.
    is_whole = is_new or param.mask is None or rows.columns >= weights_per_sector(param.parameter.dtype)
    # DistributedDataParallel's gradients may lie anywhere, while parameters do not. Only the walk has a
    # kernel for that: a step with a new mask goes weight by weight then.
    aligned = is_whole and together % _ALIGNMENT == 0 and (gradient_aligned or not is_new)
    return _Variant(
        is_new=is_new,
        aligned=aligned,
        grads_aligned=aligned and gradient_aligned,
        wide=not is_new and param.parameter.numel() >= _WIDE,
        first_rule=param.rule // _RULES_PER_LAUNCH * _RULES_PER_LAUNCH,
    )


_LISTED, _VISITED = SectorRow._fields.index("listed"), SectorRow._fields.index("visited_bits")
_MASK = SectorRow._fields.index("mask_bits")
_FIRST_CHUNK, _LENGTH = SectorRow._fields.index("first_chunk"), SectorRow._fields.index("length")


def _choose(table: Tensor, whole: Tensor, capacity: Tensor, sectors: Sequence[Sectors | None]) -> None:
    """Write into the table, on the device, which tensors are visited by their lists.

    They are those whose lists had room for all live sectors.
    """
    none = torch.zeros((), dtype=torch.int64, device=table.device)
    live = torch.stack([none if s is None else s.live for s in sectors])
    is_listed = (capacity > 0) & (live <= capacity)
    torch.where(is_listed, live, whole, out=table[:, _LENGTH])
    table[:, _LISTED].mul_(is_listed)
    torch.where(is_listed, table[:, _VISITED], table[:, _MASK], out=table[:, _VISITED])
