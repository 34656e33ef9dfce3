"""What is particular to the GPU backends and can be seen without a GPU: when they can run, which mistakes the
suite finds in them, and Triton's true tiles, which the rest of the suite enlarges."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from backends import Backend, emulate
from built_once import load
from cuda_on_cpu.build import compiler
from cuda_on_cpu.mistakes import make_mistake
from oracle import Hyper
from sector_lists import check_lists
from side_by_side import SideBySide, Spec, pattern_mask
from triton_mutants import substitute

from sparseopt_kernels import kernels
from sparseopt_kernels.kernels.gpu import cuda as cuda_backend
from sparseopt_kernels.kernels.gpu import triton as triton_backend

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
# The last has more chunks than there are programs.
SPECS = [Spec(shape, "half", torch.float32) for shape in ((5, 3), (5, 27), (5, 64), (9, 1031))]


def side_by_side(backend: Backend) -> None:
    SideBySide(backend, SPECS, [Hyper(lr=0.1, momentum=0.9, weight_decay=0.01)]).run()


# ---- when they can run ------------------------------------------------------------------------------


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A device of compute capability 9.0, and a build with code for what ``build_info`` says here."""
    info: dict[str, Any] = {"cuda": "13.0", "cuda_architectures": [80, 90], "cuda_ptx": []}
    monkeypatch.setattr(cuda_backend, "_MISSING", None)
    monkeypatch.setattr(cuda_backend, "build_info", lambda: info)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(cuda_backend, "_cuda", SimpleNamespace(driver_version=lambda: 13000), raising=False)
    cuda_backend._no_code_for.cache_clear()
    yield info
    cuda_backend._no_code_for.cache_clear()


@pytest.mark.parametrize(
    ("architectures", "ptx", "runs"),
    [
        ([80, 90], [], True),
        ([80], [], False),
        ([100], [], False),
        ([], [80], True),  # the driver translates it
        ([], [100], False),
    ],
)
def test_architectures(a_gpu: dict[str, Any], architectures: list[int], ptx: list[int], runs: bool) -> None:
    a_gpu.update(cuda_architectures=architectures, cuda_ptx=ptx)
    assert (cuda_backend.CUDA.unavailable(CUDA) is None) == runs


def test_machine_code_runs_on_later_minor_versions(
    a_gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for capability, runs in (((8, 0), True), ((8, 6), True), ((7, 5), False), ((10, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, it=capability: it)
        cuda_backend._no_code_for.cache_clear()
        assert (cuda_backend.CUDA.unavailable(CUDA) is None) == runs


@pytest.mark.parametrize(
    ("driver", "runs", "translates"),
    [(12080, False, False), (13000, True, False), (13010, True, True), (14000, True, True)],
)
def test_a_driver_that_is_too_old(
    a_gpu: dict[str, Any], driver: int, runs: bool, translates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a major version of CUDA, old drivers run new machine code, but do not translate new PTX."""
    monkeypatch.setattr(cuda_backend, "_cuda", SimpleNamespace(driver_version=lambda: driver))
    for codes, ptx, expected in (([90], [], runs), ([], [90], translates)):
        a_gpu.update(cuda="13.1", cuda_architectures=codes, cuda_ptx=ptx)
        cuda_backend._no_code_for.cache_clear()
        reason = cuda_backend.CUDA.unavailable(CUDA)
        assert (reason is None) == expected
        if not runs:
            assert reason is not None
            assert "built with CUDA 13.1, and the driver knows CUDA 12.8 at most" in reason


def test_an_architecture_that_was_not_built_is_named(a_gpu: dict[str, Any]) -> None:
    a_gpu["cuda_architectures"] = [80, 100]
    reason = cuda_backend.CUDA.unavailable(CUDA)
    assert reason is not None
    assert "cuda is an sm_90, and this build has code for sm_80, sm_100" in reason
    assert "CUDAARCHS=90" in reason


def test_cuda_is_for_nvidia_devices(a_gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuda_backend.CUDA.unavailable(CPU) == "it updates tensors on NVIDIA devices, not on cpu"
    monkeypatch.setattr(torch.version, "cuda", None)  # ROCm, whose devices are called cuda, too
    assert "NVIDIA" in str(cuda_backend.CUDA.unavailable(CUDA))


def test_auto_takes_the_next_and_warns_of_none(
    a_gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    assert kernels.backend_for("auto", CUDA) is cuda_backend.CUDA
    monkeypatch.setattr(cuda_backend, "_MISSING", "the CUDA kernels were not built")
    monkeypatch.setattr(triton_backend, "_MISSING", None)
    monkeypatch.setattr(triton_backend, "_INTERPRETED", False)
    assert kernels.backend_for("auto", CUDA) is triton_backend.TRITON
    assert not recwarn
    monkeypatch.setattr(triton_backend, "_MISSING", "Triton is not installed")
    kernels._say_once.cache_clear()
    said = "'cuda': the CUDA kernels were not built; backend 'triton': Triton is not installed"
    with pytest.warns(RuntimeWarning, match=said):
        assert kernels.backend_for("auto", CUDA) is kernels.BACKENDS["reference"]
    kernels._say_once.cache_clear()


def test_the_cuda_kernels_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_backend, "_MISSING", "the CUDA kernels were not built")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert kernels.build_info()["cuda"] is False
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run: the CUDA kernels were not built"):
        kernels.backend_for("cuda", CUDA)


def reimported() -> ModuleType:
    """A second copy of the Triton backend's module, imported now."""
    name = f"{triton_backend.__name__}_again"
    spec = importlib.util.spec_from_file_location(name, triton_backend.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_triton_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    for version, works in (("3.4.0", False), ("2.9.1", False), ("3.5.0", True), ("3.10.0+git1", True)):
        monkeypatch.setattr(triton, "__version__", version)
        reason = reimported().TRITON.unavailable(torch.device("cuda"))
        if works:
            assert reason is None
        else:
            assert reason == f"Triton {version} is installed, it needs 3.5 or newer"


def test_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    reason = reimported().TRITON.unavailable(CUDA)
    assert reason == "Triton is not installed (pip install triton)"


def test_a_triton_that_cannot_be_imported_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setitem(sys.modules, "triton.language", None)
    reason = reimported().TRITON.unavailable(CUDA)
    assert "triton.language" in reason
    assert "not installed" not in reason


def test_triton_is_for_gpus() -> None:
    pytest.importorskip("triton")
    assert triton_backend.TRITON.unavailable(CPU) == "it updates tensors on cuda and xpu devices, not on cpu"


@pytest.mark.interpreted
def test_what_is_interpreted_is_for_the_cpu() -> None:
    assert triton_backend.TRITON.unavailable(CPU) is None
    reason = triton_backend.TRITON.unavailable(CUDA)
    assert reason == "TRITON_INTERPRET is set: it updates tensors on the cpu, not on cuda"


# ---- mistakes that are found ------------------------------------------------------------------------


@pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("mistake", [None, "a weight less in the tail", "another row"])
def test_a_wrong_index_in_the_cuda_sources_is_found(
    cuda_with_mistakes: Path, mistake: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate(load(cuda_with_mistakes), monkeypatch)
    make_mistake(cuda_with_mistakes, mistake)
    found = pytest.raises(AssertionError, match="elements differ from the oracle")
    with nullcontext() if mistake is None else found:
        side_by_side(Backend("cuda", "emulated"))


# What is live of the first is by_sectors whole, of the others by lists.
SPARSE = [Spec((5, columns), "sparse99", torch.float32) for columns in (27, 515, 2048)]
MISTAKES = {
    "sectors: the tail": (
        "triton_sectors",
        "(e >= begin) & (e < entry.elements)",
        "(e >= begin) & (e + 1 < entry.elements)",
    ),
    "sectors: an index": (
        "triton_sectors",
        "first_weights(sector, WEIGHTS, WIDE) + offset\n",
        "first_weights(sector, WEIGHTS, WIDE) + offset - 1\n",
    ),
    "sectors: the last sector of a chunk": (
        "triton_sectors",
        "there = i < length\n",
        "there = i + 1 < length\n",
    ),
    "sectors: the sector after": (
        "triton_sectors",
        "tl.where(is_listed, listed, i)",
        "tl.where(is_listed, listed + 1, i)",
    ),
    "sectors: the next chunk": (
        "triton_step",
        "number + tl.num_programs(0), count, t, WEIGHTS",
        "number, count, t, WEIGHTS",
    ),
    "sectors: c_i of the next row": (
        "triton_sectors",
        "first=first,",
        "first=second,",
    ),
    "sectors: c_i where rows meet": (
        "triton_sectors",
        "second=second)",
        "second=first)",
    ),
    "sectors: no c_i": (
        "triton_sectors",
        "needed = only_if(entry.factors != 0, chunk.active != 0)",
        "needed = chunk.active != chunk.active",
    ),
    "sectors: the right half": (
        "triton_step",
        "bits_of(chunk.active, right), live_right",
        "bits_of(chunk.active, left), live_right",
    ),
    "one pass: a mask byte": (
        "triton_step",
        "(column < columns), other=0)\n        counted",
        "(column < columns - 1), other=0)\n        counted",
    ),
    "one pass: a tile": (
        "triton_step",
        "for _ in range(0, columns, WEIGHTS * UNITS)",
        "for _ in range(0, columns - WEIGHTS * UNITS * (columns % 1024 == 0), WEIGHTS * UNITS)",
    ),
    "one pass: the next mask": (
        "triton_step",
        "(mask + begin, left + WEIGHTS * UNITS, columns",
        "(mask + begin, left, columns",
    ),
    "one pass: a piece of the count": (
        "triton_step",
        "for at in range(0, columns, COUNTED)",
        "for at in range(COUNTED, columns, COUNTED)",
    ),
    "one pass: the divisor of c_i": (
        "triton_update_rule",
        "tl.div_rn(fan_in, divisor)",
        "fan_in",
    ),
    "one pass: c_i where there is none": (
        "triton_step",
        "tl.where(is_corrected, correction_factor(fan_in, divisor), 1.0)",
        "correction_factor(fan_in, divisor)",
    ),
    "list: a place": (
        "triton_lists",
        "tl.cumsum(is_live, axis=1) - is_live",
        "tl.cumsum(is_live, axis=1)",
    ),
    "list: the place of a row": (
        "triton_lists",
        "other=0) - own_live - before",
        "other=0) - before",
    ),
    "list: bits of the sector after": (
        "triton_lists",
        "tl.load(mask_bits + sector, mask",
        "tl.load(mask_bits + sector + 1, mask",
    ),
    "list: too short": (
        "triton_lists",
        "(position < entry.capacity)",
        "(position < entry.capacity // 8)",
    ),
    "list: a tile": (
        "triton_lists",
        "place += tl.sum(is_live, axis=1)[:, None]\n",
        "place += 0\n",
    ),
    "count: the fan-in of a row": (
        "triton_lists",
        "tl.int32)) + at, active, mask",
        "tl.int32)) + at, tl.sum(found, axis=1)[:, None], mask",
    ),
    "count: the first weights of a row": (
        "triton_lists",
        "tl.sum(before.to(tl.int32), axis=1)[:, None]",
        "tl.sum(before.to(tl.int32), axis=1)[:, None] * 0",
    ),
    "count: the last weights of a tensor": (
        "triton_lists",
        "there & (begin + HALF > elements)",
        "there & (begin > elements)",
    ),
    "count: those of the next row": (
        "triton_lists",
        "tl.where(e < end[:, :, None], active, 0)",
        "active",
    ),
}


def check_lists_of_two_masks() -> None:
    """Of which one is by_sectors by its list."""
    sparse = pattern_mask("sparse99", (19, 1031), torch.Generator().manual_seed(0))
    for mask in (sparse, torch.ones_like(sparse)):
        check_lists(Backend("triton"), mask, torch.float32)


@pytest.mark.interpreted
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_triton_kernels_is_found(
    tmp_path: Path, mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import interpreter

    for name, tile in interpreter.TRUE_TILES.items():
        monkeypatch.setattr(triton_backend.TritonKernels, name, tile)
    substitute(*MISTAKES[mistake], tmp_path, monkeypatch)
    if mistake.startswith(("list", "count")):  # a wrong list is no good to walk by: it would be a crash
        with pytest.raises(AssertionError):
            check_lists_of_two_masks()
        return
    rules = [
        Hyper(lr=0.1, momentum=0.9, weight_decay=0.01),
        Hyper(lr=0.1, momentum=0.9, correction="unnormalized"),
        Hyper(lr=0.1, momentum=0.9, correction="none"),
    ]
    with pytest.raises(AssertionError, match="elements differ from the oracle"):
        SideBySide(Backend("triton"), [*SPECS, *SPARSE, Spec((11,), None, torch.float32)], rules).run()


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_true_tiles(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    import interpreter

    for name, tile in interpreter.TRUE_TILES.items():
        monkeypatch.setattr(triton_backend.TritonKernels, name, tile)
    columns = (3, 27, 64, 512, 520, 2048 + 32)
    specs = [Spec((3, n), pattern, dtype) for n in columns for pattern in ("half", "sparse99")]
    run = SideBySide(Backend("triton"), [*specs, Spec((2500,), None, dtype)], [Hyper(lr=0.1, momentum=0.9)])
    run.run()
