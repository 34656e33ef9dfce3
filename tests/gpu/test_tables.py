"""The launches that tables are for: which kernel suits a tensor's memory and size, and what they read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from noted_launches import Launches
from parameters import parameters_and_masks
from torch import Tensor

from sparseopt_kernels.kernels.contract import ParamState
from sparseopt_kernels.kernels.gpu.tables import Layout, Member, SectorLaunch, StepLaunch, lay_out
from sparseopt_kernels.kernels.gpu.triton import TritonKernels
from sparseopt_kernels.kernels.memory import Rows, has_rows
from sparseopt_kernels.neurons import Neurons
from sparseopt_kernels.optimizer import SparseOpt


def dense(parameter: Tensor, momentum_buffer: Tensor | None = None) -> Member:
    param = ParamState(
        parameter=parameter,
        momentum_buffer=momentum_buffer,
        mask=None,
        given_mask=None,
        gradient_dtype=parameter.dtype,
        dim_order=None,
        neurons=Neurons(),
        rule=0,
        ham=False,
    )
    return Member(param=param, rows=Rows(1, parameter.numel()), sectors=None, factors=None)


def launch_of(member: Member) -> SectorLaunch:
    """Its gradient is aligned."""
    (launch,) = lay_out([member], bytes([1]), (), TritonKernels()).launches
    assert isinstance(launch, SectorLaunch)
    return launch


@pytest.mark.parametrize(("weights", "wide"), [(2**31 - 1, False), (2**31, True)])
def test_numbers_have_64_bits_from_2_to_the_31_weights_on(weights: int, wide: bool) -> None:
    """Where the last weight ends is 2^31 then, which int32 does not hold."""
    assert launch_of(dense(torch.empty(weights, device="meta"))).wide == wide


@pytest.mark.parametrize(("offset", "aligned"), [(0, True), (1, False), (2, False), (4, True)])
@pytest.mark.parametrize("which", ["parameter", "buffer", "both"])
def test_vectors_need_16_bytes(which: str, offset: int, aligned: bool) -> None:
    """Of parameters and of their momentum: 8 would do for no GPU. Momentum may come from a checkpoint that
    lies in memory as it was saved."""

    def at(offset: int) -> Tensor:
        return torch.zeros(68)[offset:][:64]

    member = dense(at(offset if which != "buffer" else 0), at(offset if which != "parameter" else 0))
    assert launch_of(member).aligned == aligned


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_vectors_of_gradients_need_16_bytes(launches: Launches, offset: int) -> None:
    parameters, masks = parameters_and_masks([(3, 512)])
    optimizer = SparseOpt(parameters, masks=masks, backend="triton")
    optimizer.step()
    parameters[0].grad = torch.zeros(3 * 512 + 4)[offset:][: 3 * 512].view(3, 512)
    launches.clear()
    optimizer.step()
    assert [(launch["ALIGNED"], launch["GRADS_ALIGNED"]) for launch in launches] == [(True, False)]


def test_all_memory_of_launches_is_theirs() -> None:
    """It is what other streams and graphs are told of."""
    table, indices = torch.zeros(1, 2), torch.zeros(3)
    step = StepLaunch(
        members=[0],
        dtype=torch.float32,
        aligned=True,
        momentum=True,
        rules=slice(0, 8),
        table=table,
        program_to_tensor=indices,
        programs=3,
    )
    sectors = launch_of(dense(torch.zeros(64)))
    memory = Layout(gradients_aligned=bytes([1]), launches=[step, sectors], nbytes=0).memory()
    expected = [table, indices, sectors.table, sectors.chunk_to_tensor, sectors.chunks]
    assert len(memory) == len(expected)
    assert all(any(own is t for own in memory) for t in expected)


@pytest.mark.parametrize(("columns", "known"), [(2**30 - 1, True), (2**30, False)])
def test_rows_of_more_columns_than_kernels_can_number(columns: int, known: bool) -> None:
    """They look at up to a tile behind the last column, with 31 bits."""
    parameter = torch.empty(1, columns, device="meta")
    mask = torch.empty(1, columns, dtype=torch.bool, device="meta")
    assert has_rows(replace(dense(parameter).param, mask=mask)) == known
    assert has_rows(dense(parameter).param)
    furthest = columns + max(TritonKernels.counted, 2 * 16 * TritonKernels.units)
    assert not known or furthest < 2**31
