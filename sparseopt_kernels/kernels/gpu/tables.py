"""What GPU kernels are told of tensors: tables in device memory, and the launches over them.

Made when something moves, kept from step to step. No kernel is launched here, and nothing waits.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..contract import Tensors
from ..memory import Rows, address_of
from .device import upload
from .lists import Sectors, owners, sectors_in, weights_per_sector

_GROUPS_PER_LAUNCH = 8  # their rules are arguments of the kernel, of which there are only so many
_ALIGNMENT = 16  # bytes, of the vectors in which memory is accessed
_WIDE = 2**31  # weights: numbers of them are of 64 bits from here on


class Tiles(Protocol):
    """How the kernels of a backend share out work."""

    most_tensors: int  # of one launch
    chunk: int  # sectors that are walked at a time
    by_alignment: bool  # whether kernels must be told how memory is aligned, for all tensors of a launch

    def step_rows(self, columns: int) -> int:
        """How many neurons, of so many weights, a program updates."""


class StepRow(NamedTuple):
    """What the kernel that takes whole neurons reads of a tensor, as int64."""

    parameter: int
    momentum_buffer: int  # 0: none
    mask: int  # boolean
    mean_fan_in: int  # the address of it
    rows: int
    columns: int
    first_program: int
    group: int  # among those of its launch
    ham: int


class WalkRow(NamedTuple):
    """What the kernels that walk sectors read of a tensor, as int64."""

    parameter: int
    momentum_buffer: int  # 0: none
    masks: int  # of all its sectors; 0: it is dense
    listed: int  # of listed sectors; 0: all of them are walked
    bits: int  # of the sectors that are walked
    factors: int  # c_i of Eq. 12, by rows
    unnormalized: int  # sqrt(1 - s_i), likewise
    columns: int
    elements: int
    group: int  # among those of its launch
    ham: int
    first_chunk: int
    length: int  # of what is walked, in sectors


class StepLaunch(NamedTuple):
    """Tensors whose masks are new, to be updated neuron by neuron."""

    members: list[int]  # of the plan, as in the table
    dtype: torch.dtype  # of their weights
    aligned: bool  # all memory begins at whole 16 bytes, and so do all rows
    momentum: bool  # whether one of them has a buffer
    groups: slice  # of the rules
    table: Tensor  # int64 (members, columns of StepRow)
    owner: Tensor  # int32 (programs,): whose row of the table each program reads
    programs: int


class WalkLaunch(NamedTuple):
    """Tensors that are walked, by chunks of their sectors. How many chunks there are is known to the device
    alone: it depends on which sectors are live. So a fixed number of programs share them out."""

    members: list[int]  # of the plan, as in the table
    dtype: torch.dtype  # of their weights
    aligned: bool  # parameters and momentum begin at whole 16 bytes, and no sector has parts of three rows
    momentum: bool  # whether one of them has a buffer
    groups: slice  # of the rules
    grads_aligned: bool  # gradients begin at whole 16 bytes, too
    wide: bool  # numbers of weights need 64 bits
    table: Tensor  # int64 (members, columns of WalkRow)
    owner: Tensor  # int32 (most_chunks,): whose row each chunk reads
    chunks: Tensor  # int64, 0-d: how many there are
    most_chunks: int


class _Variant(NamedTuple):
    """What decides which launch a tensor goes into."""

    is_new: bool
    aligned: bool
    grads_aligned: bool
    wide: bool
    first_group: int


class Layout(NamedTuple):
    """The launches that suit gradients of certain alignments, for all tensors that have weights."""

    gradients_aligned: bytes  # of each gradient, 1 if it is at a multiple of 16 bytes
    launches: list[StepLaunch | WalkLaunch]
    nbytes: int  # of what was uploaded for it, at most

    def memory(self) -> list[Tensor]:
        return [t for launch in self.launches for t in launch if isinstance(t, Tensor)]


def lay_out(
    tensors: Sequence[Tensors],
    rows: Sequence[Rows],
    sectors: Sequence[Sectors | None],
    gradients_aligned: bytes,
    new: Collection[int],
    tiles: Tiles,
) -> Layout:
    """The layout of a plan.

    Args:
        rows, sectors: of the tensors.
        gradients_aligned: see ``Layout``.
        new: which of them are updated neuron by neuron.
        tiles: the backend's.
    """
    maker = _Maker(tensors, rows, sectors, tiles)
    by_variant: dict[_Variant, list[int]] = {}
    for i, tensor in enumerate(tensors):
        if tensor.parameter.numel() > 0:
            variant = _variant(tensor, rows[i], bool(gradients_aligned[i]), i in new)
            if not tiles.by_alignment:
                variant = variant._replace(aligned=True, grads_aligned=True)
            by_variant.setdefault(variant, []).append(i)
    launches: list[StepLaunch | WalkLaunch] = []
    for variant, members in by_variant.items():
        make = maker.step_launch if variant.is_new else maker.walk_launch
        for at in range(0, len(members), tiles.most_tensors):
            launches.append(make(variant, members[at : at + tiles.most_tensors]))
    return Layout(gradients_aligned, launches, maker.nbytes)


class _Maker:
    """Makes launches, and sums up what it uploads for them."""

    def __init__(
        self,
        tensors: Sequence[Tensors],
        rows: Sequence[Rows],
        sectors: Sequence[Sectors | None],
        tiles: Tiles,
    ) -> None:
        self._tensors, self._rows, self._sectors, self._tiles = tensors, rows, sectors, tiles
        self._device = tensors[0].parameter.device
        self.nbytes = 0

    def step_launch(self, variant: _Variant, members: list[int]) -> StepLaunch:
        programs = [-(-self._rows[i].rows // self._tiles.step_rows(self._rows[i].columns)) for i in members]
        table, first = [], 0
        for i, count in zip(members, programs, strict=True):
            t, r = self._tensors[i], self._rows[i]
            table.append(
                StepRow(
                    parameter=t.parameter.data_ptr(),
                    momentum_buffer=address_of(t.momentum_buffer),
                    mask=address_of(r.mask),
                    mean_fan_in=address_of(r.mean_fan_in),
                    rows=r.rows,
                    columns=r.columns,
                    first_program=first,
                    group=t.group - variant.first_group,
                    ham=int(t.ham),
                )
            )
            first += count
        on_device = self._upload_table(table), self._upload(owners(programs))
        return StepLaunch(members, *self._common(variant, members), *on_device, first)

    def walk_launch(self, variant: _Variant, members: list[int]) -> WalkLaunch:
        """Which sectors there are to walk is for the device to know, and not for the host to wait for."""
        sectors = [self._sectors[i] for i in members]
        lanes = weights_per_sector(self._tensors[members[0]].parameter.dtype)
        whole = [sectors_in(self._tensors[i].parameter.numel(), lanes) for i in members]
        capacity = [0 if s is None else s.listed.numel() for s in sectors]
        table = [
            (*self._walk_row(i, variant), *own) for i, *own in zip(members, whole, capacity, strict=True)
        ]
        numbers = self._upload_table(table)
        rows = numbers[:, :-2].clone()
        _choose(rows, numbers[:, -2], numbers[:, -1], sectors)
        chunk = self._tiles.chunk
        chunks = (rows[:, _LENGTH] + (chunk - 1)) // chunk
        ends = chunks.cumsum(0)
        torch.sub(ends, chunks, out=rows[:, _FIRST_CHUNK])
        most = sum(-(-count // chunk) for count in whole)
        owner = torch.searchsorted(ends, torch.arange(most, device=self._device), right=True, out_int32=True)
        return WalkLaunch(
            members,
            *self._common(variant, members),
            grads_aligned=variant.grads_aligned,
            wide=variant.wide,
            table=rows,
            owner=owner,
            chunks=ends[-1].clone(),
            most_chunks=most,
        )

    def _walk_row(self, i: int, variant: _Variant) -> WalkRow:
        t, sectors = self._tensors[i], self._sectors[i]
        return WalkRow(
            parameter=t.parameter.data_ptr(),
            momentum_buffer=address_of(t.momentum_buffer),
            masks=0 if sectors is None else sectors.masks.data_ptr(),
            listed=0 if sectors is None else sectors.listed.data_ptr(),
            bits=0 if sectors is None else sectors.bits.data_ptr(),
            factors=0 if sectors is None else sectors.factors.data_ptr(),
            unnormalized=0 if sectors is None else sectors.factors.data_ptr() + sectors.factors.nbytes // 2,
            columns=self._rows[i].columns,
            elements=t.parameter.numel(),
            group=t.group - variant.first_group,
            ham=int(t.ham),
            first_chunk=0,  # this and the next are written on the device
            length=0,
        )

    def _common(self, variant: _Variant, members: Sequence[int]) -> tuple[torch.dtype, bool, bool, slice]:
        """What launches of both kinds have: dtype, aligned, momentum, groups."""
        momentum = any(self._tensors[i].momentum_buffer is not None for i in members)
        groups = slice(variant.first_group, variant.first_group + _GROUPS_PER_LAUNCH)
        return self._tensors[0].parameter.dtype, variant.aligned, momentum, groups

    def _upload_table(self, rows: Sequence[tuple[int, ...]]) -> Tensor:
        return self._upload(torch.tensor(rows, dtype=torch.int64, device="cpu"))

    def _upload(self, values: Tensor) -> Tensor:
        self.nbytes += values.nbytes + _ALIGNMENT
        return upload(values, self._device)


def are_aligned(addresses: bytes) -> bytes:
    """Of each address, of 8 bytes, 1 if it is a multiple of 16, else 0."""
    return addresses[_LOWEST::8].translate(_IS_ALIGNED)


_LOWEST = 0 if sys.byteorder == "little" else 7
_IS_ALIGNED = bytes(byte % _ALIGNMENT == 0 for byte in range(256))


def _variant(tensors: Tensors, rows: Rows, gradient_aligned: bool, is_new: bool) -> _Variant:
    together = tensors.parameter.data_ptr() | address_of(tensors.momentum_buffer)
    if is_new:
        together |= rows.columns * tensors.parameter.itemsize
    # In a sector there are parts of two rows at most.
    is_whole = is_new or tensors.mask is None or rows.columns >= weights_per_sector(tensors.parameter.dtype)
    # DistributedDataParallel's gradients may lie anywhere, while parameters do not. Only the walk has a
    # kernel for that: a step with a new mask goes weight by weight then.
    aligned = is_whole and together % _ALIGNMENT == 0 and (gradient_aligned or not is_new)
    return _Variant(
        is_new=is_new,
        aligned=aligned,
        grads_aligned=aligned and gradient_aligned,
        wide=not is_new and tensors.parameter.numel() >= _WIDE,
        first_group=tensors.group // _GROUPS_PER_LAUNCH * _GROUPS_PER_LAUNCH,
    )


_LISTED, _BITS = WalkRow._fields.index("listed"), WalkRow._fields.index("bits")
_MASKS = WalkRow._fields.index("masks")
_FIRST_CHUNK, _LENGTH = WalkRow._fields.index("first_chunk"), WalkRow._fields.index("length")


def _choose(table: Tensor, whole: Tensor, capacity: Tensor, sectors: Sequence[Sectors | None]) -> None:
    """Write into the table, on the device, which of the tensors are walked by their lists: those whose lists
    had room for all live sectors."""
    none = torch.zeros((), dtype=torch.int64, device=table.device)
    live = torch.stack([none if s is None else s.live for s in sectors])
    is_listed = (capacity > 0) & (live <= capacity)
    torch.where(is_listed, live, whole, out=table[:, _LENGTH])
    table[:, _LISTED].mul_(is_listed)
    torch.where(is_listed, table[:, _BITS], table[:, _MASKS], out=table[:, _BITS])
