"""Fixtures of all tests: the backends, and memory that is never clean by luck."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch
from backends import EXECUTED, INTERPRETED, ISA_VARIABLE, NATIVE_ISAS, Backend, emulate, why_not
from built_once import load
from cuda_on_cpu.build import build
from cuda_on_cpu.mistakes import build_with_mistakes
from ptx.cuda_executed import CudaExecuted
from ptx.machine import Machine
from pytest_server import PytestServer

from sparseopt_kernels.kernels import BACKENDS, cpu
from sparseopt_kernels.kernels.reference import REFERENCE

if TYPE_CHECKING:
    from ptx.triton_executed import TritonExecuted


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped where there is none")
    config.addinivalue_line("markers", "interpreted: runs under TRITON_INTERPRET=1, and only there")
    config.addinivalue_line(
        "markers", "compiled: compiles C++, CUDA or Triton, or looks at the code; not in `make test-fast`"
    )
    config.addinivalue_line(
        "markers", "slow: takes a second or more, or one more path of a backend; not in `make test-fast`"
    )
    config.addinivalue_line(
        "markers", "same_bits_as_sgd: results of PyTorch's own kernels are the oracle, to the last bit"
    )


if INTERPRETED:
    import interpreter

    interpreter.prepare()
    PATHS: list[Any] = ["triton"]
elif EXECUTED:
    PATHS = ["triton-executed", "cuda-executed"]
else:
    # A backend is tested by its name, but for these.
    others: dict[str, list[Any]] = {
        # "device": as on an accelerator, scalars stay in tensors.
        "reference": ["reference", pytest.param("reference-device", marks=pytest.mark.slow)],
        "cpu": [
            pytest.param(f"cpu-{isa}", marks=[] if isa in cpu.available_isas()[:1] else pytest.mark.slow)
            for isa in NATIVE_ISAS
        ],
        "triton": [],  # in the run where it is interpreted
        # "emulated": the CUDA sources, on the CPU.
        "cuda": [pytest.param("cuda-emulated", marks=pytest.mark.compiled)],
    }
    PATHS = [path for name in BACKENDS for path in others.get(name, [name])]


# The instruction sets are one source of loops. These rooms ask whether each computes what it must. What else
# a step does is the same for all: other rooms take the best.
EACH_ISA = {"update_rule", "kernels", "gpu"}
# PyTorch's tests of optimizers ask what the host does. That is the same for both GPU backends, and the
# emulated CUDA backend is quicker than Triton's interpreter.
NOT_INTERPRETED = {"torch_suite"}


def room_of(item: pytest.Item) -> str:
    return item.path.relative_to(Path(__file__).parent).parts[0]


def is_of_another_isa(item: pytest.Item) -> bool:
    """Tell if a test is about no arithmetic, and takes an instruction set that is not this machine's best."""
    path = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
    if not (isinstance(path, str) and path.startswith("cpu-")):
        return False
    return room_of(item) not in EACH_ISA and path.removeprefix("cpu-") not in cpu.available_isas()[:1]


def fixtures_of(item: pytest.Item) -> list[str]:
    return item.fixturenames if isinstance(item, pytest.Function) else []


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what compiles the CUDA sources. Under TRITON_INTERPRET=1, keep what is about backends, and what
    asks for it. Likewise where compiled kernels are executed. Keep one instruction set where the others would
    do the same."""
    for item in items:
        if "cuda_cache" in fixtures_of(item):
            item.add_marker(pytest.mark.compiled)
    kept = [
        item
        for item in items
        if (
            bool(item.get_closest_marker("interpreted")) == INTERPRETED
            or (INTERPRETED and "backend" in fixtures_of(item) and room_of(item) not in NOT_INTERPRETED)
        )
        and (not EXECUTED or "backend" in fixtures_of(item))
        and not is_of_another_isa(item)
    ]
    left_out = set(items).difference(kept)
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = kept


def pytest_collection_finish() -> None:
    """Thousands of tests are no garbage: without them, a collection that a test asks for is quick."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


def kept_folder(request: pytest.FixtureRequest, name: str) -> Path:
    """A folder that is kept from run to run, unless pytest keeps nothing."""
    cache = getattr(request.config, "cache", None)
    if cache is not None:
        return Path(cache.mkdir(name))
    return Path(request.getfixturevalue("tmp_path_factory").mktemp(name))


@pytest.fixture(scope="session")
def cuda_cache(request: pytest.FixtureRequest) -> Path:
    """Where what is made of the CUDA sources is kept."""
    return kept_folder(request, "cuda_on_cpu")


@pytest.fixture(scope="session")
def cuda_library(cuda_cache: Path) -> Path:
    """The module ``_cuda``, compiled for the CPU."""
    return build(cuda_cache)


@pytest.fixture(scope="session")
def cuda_with_mistakes(cuda_cache: Path) -> Path:
    """The same with all mistakes; ``make_mistake`` chooses one."""
    return build_with_mistakes(cuda_cache)


@pytest.fixture(scope="session")
def cuda(cuda_library: Path) -> ModuleType:
    return load(cuda_library)


@pytest.fixture(scope="session")
def ptx_cache(request: pytest.FixtureRequest) -> Path:
    """Where what executes PTX is kept, and the PTX."""
    return kept_folder(request, "ptx")


@pytest.fixture(scope="session")
def machine(ptx_cache: Path) -> Machine:
    return Machine(ptx_cache)


@pytest.fixture(scope="session")
def triton_executed(machine: Machine, ptx_cache: Path) -> TritonExecuted:
    from ptx.triton_executed import TritonExecuted

    return TritonExecuted(machine, ptx_cache / "triton")


@pytest.fixture(scope="session")
def cuda_executed(machine: Machine, ptx_cache: Path) -> CudaExecuted:
    return CudaExecuted(machine, ptx_cache)


@pytest.fixture(scope="session")
def forked_pytest() -> Iterator[PytestServer]:
    with PytestServer() as server:
        yield server


@pytest.fixture(params=PATHS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """Each backend and each of its instruction sets; skipped, with the reason, where it cannot run.

    PyTorch fuses multiply-adds where the CPU can, and our plain path, made for CPUs that cannot, does not:
    ``test_plain_path_has_the_bits_of_a_plain_pytorch`` runs what is skipped here for that reason.
    """
    name, _, isa = request.param.partition("-")
    chosen = Backend(name, isa or None)
    reason = why_not(chosen)
    if reason is not None:
        pytest.skip(f"backend {request.param!r} cannot run: {reason}")
    fused = torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX")  # PyTorch 2.6: the latter
    if chosen.isa == "plain" and fused and request.node.get_closest_marker("same_bits_as_sgd"):
        pytest.skip("PyTorch fuses multiply-adds on this CPU: compared in a process where it does not")
    if chosen.isa in NATIVE_ISAS:
        monkeypatch.setenv(ISA_VARIABLE, chosen.isa)
    if request.param == "reference-device":
        monkeypatch.setattr(REFERENCE, "host_scalars", lambda device: False)
    if request.param == "cuda-emulated":
        emulate(request.getfixturevalue("cuda"), monkeypatch)
    monkeypatch.delenv("SPARSEOPT_BACKEND", raising=False)
    with request.getfixturevalue(f"{name}_executed").active() if isa == "executed" else nullcontext():
        yield chosen


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fill uninitialised memory with NaN: an element that nobody wrote fails its test."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors gain nothing from threads; a test that is about threads asks for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
