"""What the Triton kernels are told of tensors: a table of them in device memory, and the launches.

Made when something moves, kept from step to step. No kernel is launched here, and nothing waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .contract import Tensors
from .device import upload
from .memory import Rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The weights of a tile are shared by the 128 threads of a program. As many as leave registers for several
# programs at a time (tests/test_compiled_triton.py): fewer where each is an access of its own.
_SHORT_ROW = 64  # mask bytes, that is 512 columns
_SHORT = {"ROWS": 4, "BYTES": _SHORT_ROW}
_SHORT_UNALIGNED = {"ROWS": 2, "BYTES": _SHORT_ROW}
_LONG = {"ROWS": 1, "BYTES": 128}
_DENSE = {"SIZE": 2048}
_DENSE_UNALIGNED = {"SIZE": 1024}
_GROUPS_PER_LAUNCH = 8  # their rules are arguments of the kernel, of which there are only so many


class TableRow(NamedTuple):
    """What the kernels read of one tensor, as int64."""

    parameter: int
    momentum_buffer: int
    bits: int
    mean_fan_in: int  # the address of it
    rows: int
    columns: int
    first_program: int
    group: int  # among those of its launch
    ham: int


class Launch(NamedTuple):
    """Tensors that go through the same variant of a kernel."""

    masked: bool
    tile: dict[str, int]
    aligned: bool  # all rows of all tensors are whole numbers of 16 bytes, at multiples of them
    momentum: bool
    groups: slice  # of the rules
    programs: int
    owner: Tensor  # int32 (programs,): whose row of the table each program reads


class _Variant(NamedTuple):
    """What decides which launch a tensor goes into."""

    masked: bool
    short: bool
    aligned: bool
    momentum: bool
    first_group: int

    def tile(self) -> dict[str, int]:
        if self.masked and not self.short:
            return _LONG
        if self.masked:
            return _SHORT if self.aligned else _SHORT_UNALIGNED
        return _DENSE if self.aligned else _DENSE_UNALIGNED


class Layout:
    """The table of tensors, and the launches over it.

    Attributes:
        table: int64 (tensors, columns of ``TableRow``).
        launches: which programs read it.
        gradients_aligned: of each gradient, whether it is at a multiple of 16 bytes.
        nbytes: of what was uploaded for it.
    """

    def __init__(
        self, tensors: Sequence[Tensors], rows: Sequence[Rows], gradients_aligned: Sequence[bool]
    ) -> None:
        self.gradients_aligned = gradients_aligned
        members: dict[_Variant, list[int]] = {}
        for i, aligned in enumerate(gradients_aligned):
            members.setdefault(_variant(tensors[i], rows[i], aligned), []).append(i)
        device = tensors[0].parameter.device
        table: dict[int, TableRow] = {}
        self.launches: list[Launch] = []
        for variant, indices in members.items():
            programs: list[int] = []
            for i in indices:
                table[i] = _table_row(tensors[i], rows[i], variant.first_group, sum(programs))
                programs.append(_programs(rows[i], variant))
            if sum(programs) == 0:  # all of them are empty
                continue
            owner = torch.tensor(indices, dtype=torch.int32).repeat_interleave(torch.tensor(programs))
            self.launches.append(
                Launch(
                    variant.masked,
                    variant.tile(),
                    variant.aligned,
                    variant.momentum,
                    slice(variant.first_group, variant.first_group + _GROUPS_PER_LAUNCH),
                    sum(programs),
                    upload(owner, device),
                )
            )
        self.table = upload(torch.tensor([table[i] for i in range(len(tensors))], dtype=torch.int64), device)
        self.nbytes = self.table.nbytes + sum(launch.owner.nbytes for launch in self.launches)


def alignments(addresses: bytes) -> list[bool]:
    """Of each address, of 8 bytes, whether it is a multiple of 16."""
    return [address % 16 == 0 for address in memoryview(addresses).cast("Q")]


def _variant(tensors: Tensors, rows: Rows, gradient_aligned: bool) -> _Variant:
    parameter, buffer = tensors.parameter, tensors.momentum_buffer
    addresses = [parameter.data_ptr(), 0 if buffer is None else buffer.data_ptr()]
    aligned = gradient_aligned and all(address % 16 == 0 for address in addresses)
    return _Variant(
        masked=rows.bits is not None,
        short=rows.bits is not None and rows.columns <= 8 * _SHORT_ROW,
        aligned=aligned and rows.columns * parameter.dtype.itemsize % 16 == 0,
        momentum=buffer is not None,
        first_group=tensors.group // _GROUPS_PER_LAUNCH * _GROUPS_PER_LAUNCH,
    )


def _programs(rows: Rows, variant: _Variant) -> int:
    tile = variant.tile()
    return -(-rows.rows // tile["ROWS"]) if variant.masked else -(-rows.columns // tile["SIZE"])


def _table_row(tensors: Tensors, rows: Rows, first_group: int, first_program: int) -> TableRow:
    def address(tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor.data_ptr()

    return TableRow(
        parameter=tensors.parameter.data_ptr(),
        momentum_buffer=address(tensors.momentum_buffer),
        bits=address(rows.bits),
        mean_fan_in=address(rows.mean_fan_in),
        rows=rows.rows,
        columns=rows.columns,
        first_program=first_program,
        group=tensors.group - first_group,
        ham=int(tensors.ham),
    )


def pack(mask: Tensor) -> tuple[Tensor, Tensor]:
    """A boolean matrix as bits, and how many of them are set: uint8 of shape ``(rows, columns / 8, rounded
    up)``, lowest bit first, each row padded with zeros to whole bytes; 0-d int64."""
    rows, columns = mask.shape
    bytes_of_8 = torch.constant_pad_nd(mask.view(torch.uint8), (0, -columns % 8)).view(rows, -1, 8)  # a copy
    bytes_of_8 <<= torch.arange(8, dtype=torch.uint8, device=mask.device)
    return bytes_of_8.sum(dim=2, dtype=torch.uint8), mask.sum()
