"""What is particular to the GPU backends and can be seen without a GPU: when they can run, which mistakes the
suite finds in them, and Triton's true tiles, which the rest of the suite enlarges."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from backends import Backend, emulate
from cuda_on_cpu.build import Substitution, build, compiler, load
from oracle import Hyper
from side_by_side import SideBySide, Spec

from sparseopt_kernels import kernels
from sparseopt_kernels.kernels import cuda as cuda_backend
from sparseopt_kernels.kernels import triton as triton_backend
from sparseopt_kernels.kernels import triton_plan

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
SPECS = [Spec((9, columns), "half", torch.float32) for columns in (3, 27, 64, 1031)]


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
    monkeypatch.setattr(triton_backend, "_MISSING", "Triton is not installed")
    assert kernels.backend_for("auto", CUDA) is cuda_backend.CUDA
    assert not recwarn
    monkeypatch.setattr(cuda_backend, "_MISSING", "the CUDA kernels were not built")
    kernels._say_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="'triton': Triton is not installed; backend 'cuda': the CUDA"):
        assert kernels.backend_for("auto", CUDA) is kernels.BACKENDS["reference"]
    kernels._say_once.cache_clear()


def test_the_cuda_kernels_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_backend, "_MISSING", "the CUDA kernels were not built")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert kernels.build_info()["cuda"] is False
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run: the CUDA kernels were not built"):
        kernels.backend_for("cuda", CUDA)


def reimported(name: str) -> ModuleType:
    """A second copy of the Triton backend's module, imported now."""
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
        reason = reimported("sparseopt_kernels.kernels.triton_again").TRITON.unavailable(torch.device("cuda"))
        if works:
            assert reason is None
        else:
            assert reason == f"Triton {version} is installed, it needs 3.5 or newer"


def test_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    reason = reimported("sparseopt_kernels.kernels.triton_again").TRITON.unavailable(CUDA)
    assert reason == "Triton is not installed (pip install triton)"


def test_a_triton_that_cannot_be_imported_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setitem(sys.modules, "triton.language", None)
    reason = reimported("sparseopt_kernels.kernels.triton_again").TRITON.unavailable(CUDA)
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
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("left < kLanes ? static_cast<int>(left)", "left < kLanes ? static_cast<int>(left) - 1"),
        ("first + (threadIdx.x >> log2)", "first + 1 + (threadIdx.x >> log2)"),
    ],
    ids=["tail", "row"],
)
def test_a_wrong_index_in_the_cuda_sources_is_found(
    cuda_cache: Path, old: str, new: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate(load(build(cuda_cache, [Substitution("cuda/rows.h", old, new)])), monkeypatch)
    with pytest.raises(AssertionError, match="elements differ from the oracle"):
        side_by_side(Backend("cuda", "emulated"))


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("& (column < shape.columns)", "& (column < shape.columns - 1)"),
        ("mask=inside & (o >= 0) & (o < row_bytes)", "mask=inside & (o >= 0) & (o < row_bytes - 1)"),
        ("tile = tiles - 1 - i", "tile = i"),
    ],
    ids=["tail", "mask-byte", "tile"],
)
def test_a_wrong_index_in_the_triton_kernel_is_found(
    tmp_path: Path, old: str, new: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparseopt_kernels.kernels import triton_step

    assert triton_step.__file__ is not None
    source = Path(triton_step.__file__).read_text()
    assert old in source
    path = tmp_path / "mutant.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("mutant", path)
    assert spec is not None
    assert spec.loader is not None
    mutant = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mutant", mutant)
    spec.loader.exec_module(mutant)
    monkeypatch.setattr(triton_backend, "triton_step", mutant)
    with pytest.raises(AssertionError, match="elements differ from the oracle"):
        side_by_side(Backend("triton"))


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_true_tiles(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    import interpreter

    for name, tile in interpreter.TRUE_TILES.items():
        monkeypatch.setattr(triton_plan, name, tile)
    specs = [Spec((9, columns), "half", dtype) for columns in (3, 27, 64, 512, 520, 2048 + 32)]
    run = SideBySide(Backend("triton"), [*specs, Spec((2500,), None, dtype)], [Hyper(lr=0.1, momentum=0.9)])
    run.run()
