"""Where the GPU backends launch: on the device of the tensors, on the stream of the caller, with kernels that
were loaded there, and no more programs than fit. No GPU is needed: ``pretended_gpus.py`` notes what is asked
of one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from noted_launches import new_mask
from parameters import parameters_and_masks
from pretended_gpus import HERE, Gpus, pretend

from sparseopt_kernels.kernels.gpu import device, plan, triton
from sparseopt_kernels.optimizer import SparseOpt
from sparseopt_kernels.skipped_steps import SkippedStep

KERNELS = {"count_rows", "list_sectors", "masked_step", "sector_step", "sector_squares"}
BACKENDS = ["triton", "cuda"]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    return pretend(monkeypatch)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_step_is_on_the_device_of_its_tensors_and_the_stream_of_its_caller(gpus: Gpus, name: str) -> None:
    """All kernels, while another device is current; those that are launched to be loaded, too."""
    parameters, masks = parameters_and_masks([(8, 64), (9,)])
    optimizer = SparseOpt(parameters, 0.1, 0.9, masks=masks, max_grad_norm=1.0, backend=name)
    for stream in (7, 8):
        gpus.streams[HERE] = stream
        for _ in range(2):
            optimizer.step()
        assert {launch.kernel for launch in gpus.launches} == KERNELS
        assert {(launch.device, launch.stream) for launch in gpus.launches} == {(HERE, stream)}
        gpus.launches.clear()
        new_mask(optimizer)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_mask_is_kept_for_the_stream_of_the_step(gpus: Gpus, name: str) -> None:
    """It may be another one than that of the lists: those were made in a step that was left out."""
    parameters, masks = parameters_and_masks([(8, 64)])
    optimizer = SparseOpt(parameters, 0.1, 0.9, masks=masks, backend=name)
    optimizer.step()
    new_mask(optimizer)
    left_out = SkippedStep(masks)
    optimizer.step()
    gpus.streams[HERE] = 8
    optimizer.step()
    (mask,) = masks.values()
    assert (mask.data_ptr(), 8) in gpus.recorded
    del left_out


@pytest.mark.parametrize("name", BACKENDS)
def test_captures_of_other_devices_do_not_matter(
    gpus: Gpus, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams are asked whether a graph is captured: those of the device of the tensors."""
    asked = []

    def capturing() -> bool:
        asked.append(gpus.current)
        return False

    for module in (device, plan):
        monkeypatch.setattr(module, "capturing", capturing)
    parameters, masks = parameters_and_masks([(8, 64), (9,)])
    optimizer = SparseOpt(parameters, 0.1, 0.9, masks=masks, max_grad_norm=1.0, backend=name)
    for _ in range(2):
        optimizer.step()
    new_mask(optimizer)
    optimizer.step()
    assert set(asked) == {HERE}


# ---- Triton's kernels -------------------------------------------------------------------------------


def launch(on: torch.device) -> None:
    from sparseopt_kernels.kernels.gpu import triton_lists

    table: Any = SimpleNamespace(device=on, data_ptr=lambda: 64)
    triton._launch(triton_lists.count_rows, 1, [table], {"ROWS": 2})


def test_each_device_has_kernels_of_its_own(gpus: Gpus) -> None:
    """A function that was loaded on one device is none of another."""
    devices = [torch.device("cuda", 0), torch.device("cuda", 1)]
    gpus.streams.update(dict.fromkeys(devices, 3))
    for _ in range(2):
        for each in devices:
            with gpus.guard(each):
                launch(each)
    assert [launched.device for launched in gpus.launches] == devices * 2
    assert [where for _, where in gpus.loads] == devices


def test_each_number_of_groups_has_kernels_of_its_own(gpus: Gpus) -> None:
    """Their rules are arguments, for so many of which a kernel is compiled."""
    parameters, masks = parameters_and_masks([(8, 64), (4, 64)])
    for groups in (1, 2, 1):
        split = [{"params": parameters[i::groups]} for i in range(groups)]
        optimizer = SparseOpt(split, lr=0.1, masks=masks, backend="triton")
        for _ in range(2):
            optimizer.step()
    loaded = [kernel for kernel, _ in gpus.loads]
    assert {kernel: loaded.count(kernel) for kernel in ("count_rows", "masked_step", "sector_step")} == {
        "count_rows": 1,
        "masked_step": 2,
        "sector_step": 2,
    }


@pytest.mark.parametrize(
    ("registers", "fit"),
    [(0, 32), (64, 32), (65, 28), (72, 28), (73, 25), (255, 8)],  # of 65536: by eights, for 32 threads
)
def test_programs_that_share_out_the_work_are_as_many_as_fit(gpus: Gpus, registers: int, fit: int) -> None:
    """More would wait until others are done. Programs of other kernels have work of their own."""
    gpus.multiprocessors, gpus.registers = 3, registers
    parameters, masks = parameters_and_masks([(400, 100)])
    optimizer = SparseOpt(parameters, 0.1, 0.9, masks=masks, max_grad_norm=1.0, backend="triton")
    optimizer.step()
    chunks = -(-400 * 100 // (8 * triton.TritonKernels.chunk))
    assert {(launched.kernel, launched.programs) for launched in gpus.launches} == {
        ("count_rows", 400 // triton.TritonKernels.list_rows),
        ("list_sectors", 400 // triton.TritonKernels.list_rows),
        ("masked_step", 400 // triton.TritonKernels.rows),
        ("sector_step", 3 * fit),
        ("sector_squares", 3 * triton.PROGRAMS),  # they write a sum each, before it is known how many fit
    }
    assert chunks > 3 * triton.PROGRAMS


def test_programs_are_no_more_than_chunks(gpus: Gpus) -> None:
    gpus.multiprocessors = 132
    parameters, masks = parameters_and_masks([(3, 256), (9,)])
    optimizer = SparseOpt(parameters, 0.1, 0.9, masks=masks, max_grad_norm=1.0, backend="triton")
    for _ in range(2):
        optimizer.step()
    shared = {"sector_step", "sector_squares"}
    assert {launched.programs for launched in gpus.launches[-2:]} == {3 + 1}
    assert {launched.kernel for launched in gpus.launches[-2:]} == shared
