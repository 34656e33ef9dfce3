"""Steps of the CUDA library on tensors of more weights than 32 bits can count."""

from __future__ import annotations

import mmap

import pytest
import torch
from cuda_on_cpu.calls import Hyper, inputs_of

from sparseopt_kernels.kernels.gpu import cuda as backend
from sparseopt_kernels.kernels.gpu.tables import SectorLaunch, SectorRow, StepLaunch, StepRow
from sparseopt_kernels.kernels.tensor_memory import addresses_of

NO_RESERVE = 0x4000  # Linux's MAP_NORESERVE, which Python has a name for from 3.13 on
BEFORE = 1 << 33  # bytes: where 32 bits make a negative number of it


class Far:
    """Memory of a tensor that is larger than this machine's: pages exist once they are touched. In front of
    it there is as much, so that a wrong address is a wrong number and no crash."""

    def __init__(self, elements: int, dtype: torch.dtype) -> None:
        size = BEFORE + elements * dtype.itemsize + mmap.PAGESIZE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
        try:
            self._memory = mmap.mmap(-1, size, flags=flags)
        except (OSError, ValueError) as error:
            pytest.skip(f"no address space: {error}")
        self.tensor = torch.frombuffer(
            self._memory, dtype=dtype, count=elements, offset=BEFORE // mmap.PAGESIZE * mmap.PAGESIZE
        )


class FarWeight:
    """A float32 matrix with a few active weights, all in its last row, with gradients of 1."""

    columns = 1 << 20

    def __init__(self, rows: int, tail: int) -> None:
        self.rows = rows
        self.elements = rows * self.columns
        self.p, self.g, self.b = (Far(self.elements, torch.float32).tensor for _ in range(3))
        self.active = torch.tensor([self.elements - self.columns, self.elements - 77, self.elements - tail])
        self.g[self.active] = 1.0
        self.p[self.active] = 0.5
        self.factors = torch.full((rows,), float("nan"))
        self.factors[-1] = 3.0
        self.rule = Hyper(lr=0.5, momentum=0.0, dampening=0.0, weight_decay=0.0).rule()

    def check(self, c: float) -> None:
        expected = torch.full((3,), 0.5 - 0.5 * c)
        assert torch.equal(self.p[self.active], expected)
        assert torch.equal(self.b[self.active], torch.full((3,), c))


# Below 2^31 weights, and such that 32 bits are not enough, signed or not.
SIZES = {"narrow": 2047, "wide": 2049, "wider": 4097}


def step_far(rows: int) -> None:
    weight = FarWeight(rows, tail=1)
    mask = Far(weight.elements, torch.bool).tensor
    mask[weight.active] = True
    mean = torch.tensor(3.0 / 4.0)
    # The only program is the last one of the tensor.
    row = StepRow(
        parameter=weight.p.data_ptr(),
        momentum_buffer=weight.b.data_ptr(),
        mask=mask.data_ptr(),
        divisor=mean.data_ptr(),
        rows=rows,
        columns=weight.columns,
        first_program=1 - rows,
        rule=0,
        ham=0,
    )
    assert backend.CudaKernels().step_rows(weight.columns) == 1
    launch = StepLaunch(
        members=[0],
        dtype=torch.float32,
        aligned=True,
        momentum=True,
        rules=slice(0, 8),
        table=torch.tensor([row]),
        program_to_tensor=torch.zeros(1, dtype=torch.int32),
        programs=1,
    )
    kernels, inputs = backend.CudaKernels(), inputs_of([], [weight.rule])
    kernels.masked_step(launch, kernels.place(addresses_of([weight.g]), mask.device), inputs)
    weight.check(2.0)  # sqrt(3 / mean)


def sectors_far(rows: int, *, is_listed: bool) -> None:
    weight = FarWeight(rows, tail=8)
    numbers = weight.active // 8
    if is_listed:
        listing = numbers.int()
        bits = torch.tensor([1 << int(e) % 8 for e in weight.active], dtype=torch.uint8)
        length, chunk = 3, 0
    else:
        # Only the last chunk, of 32 sectors.
        sectors = weight.elements // 8
        bits = Far(sectors, torch.uint8).tensor
        bits[numbers] = torch.tensor([1 << int(e) % 8 for e in weight.active], dtype=torch.uint8)
        weight.active = weight.active[1:]
        length, chunk = sectors, sectors // 32 - 1
    row = SectorRow(
        parameter=weight.p.data_ptr(),
        momentum_buffer=weight.b.data_ptr(),
        mask_bits=0,
        listed=listing.data_ptr() if is_listed else 0,
        visited_bits=bits.data_ptr(),
        factors=weight.factors.data_ptr(),
        columns=weight.columns,
        elements=weight.elements,
        rule=0,
        ham=0,
        first_chunk=-chunk,
        length=length,
    )
    launch = SectorLaunch(
        members=[0],
        dtype=torch.float32,
        aligned=True,
        grads_aligned=True,
        momentum=True,
        rules=slice(0, 8),
        wide=weight.elements >= 2**31,
        table=torch.tensor([row]),
        chunk_to_tensor=torch.zeros(1, dtype=torch.int32),
        chunks=torch.tensor(1),
        most_chunks=1,
    )
    kernels, inputs = backend.CudaKernels(), inputs_of([], [weight.rule])
    gradients = kernels.place(addresses_of([weight.g]), bits.device)
    kernels.sector_step(launch, gradients, inputs)
    expected = torch.full((len(weight.active),), 3.0)
    assert torch.equal(weight.b[weight.active], expected)
    assert torch.equal(weight.p[weight.active], 0.5 - 0.5 * expected)
    squares = kernels.sector_squares(launch, gradients)
    assert float(squares.sum()) == 9.0 * len(weight.active)
