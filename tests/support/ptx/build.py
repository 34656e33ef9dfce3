"""Compiles what executes PTX, and the CUDA backend by nvcc: its host code, and the PTX of its kernels."""

from __future__ import annotations

import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from built_once import built_once, key_of, run
from cuda_code import NVCC, SOURCES, flags
from cuda_on_cpu.build import compiler

HERE = Path(__file__).parent.resolve()
ARCHITECTURE = 90
_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
_INCLUDES = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
_SHARED = ["-std=c++17", "-fPIC", "-fvisibility=hidden"]
# The machine rounds as instructions say, and changes the way to round.
_MACHINE = ["-O1", "-march=native", "-ffp-contract=off", "-frounding-math", "-shared", "-Wall", "-Wextra"]
NO_NVCC = "there is no nvcc (it comes with the CUDA toolkit, or by pip install nvidia-cuda-nvcc)"


def why_no_machine() -> str | None:
    return None if compiler() else "there is no C++ compiler"


def why_no_cuda() -> str | None:
    """The reason why the CUDA backend cannot be compiled by nvcc and executed here."""
    return why_no_machine() or (None if NVCC else NO_NVCC)


def build_machine(directory: Path) -> Path:
    """The path of the module ``_machine``."""
    sources = sorted([*HERE.glob("*.h"), HERE / "machine.cpp"])

    def make(target: Path) -> None:
        run([str(compiler()), *_SHARED, *_MACHINE, *_INCLUDES, "-o", target, HERE / "machine.cpp"])

    key = key_of(*(source.read_text() for source in sources), _MACHINE, pybind11.__version__, sys.version)
    return built_once(directory, f"_machine{_SUFFIX}", key, make)


def build_cuda(directory: Path) -> Path:
    """The path of the module ``_cuda``, whose kernels are given to the recording runtime beside this file."""
    sources = [HERE / "recording_runtime.cpp", *_sources_of(SOURCES)]
    key = key_of(*((source.name, source.read_text()) for source in sources), NVCC, _SHARED, sys.version)
    return built_once(directory, f"_cuda{_SUFFIX}", key, _make_cuda)


def build_ptx(directory: Path, sources: Path = SOURCES) -> dict[str, str]:
    """The PTX of each file of csrc/cuda by its name.

    Args:
        directory: where it is kept.
        sources: csrc, or a copy of it.
    """
    included = {path.name: path.read_text() for path in _sources_of(sources)}
    headers = {name: text for name, text in included.items() if name.endswith(".h")}

    def ptx(unit: str) -> str:
        def make(target: Path) -> None:
            _nvcc("-ptx", "-o", target, sources / "cuda" / unit)

        key = key_of(headers, included[unit], NVCC, flags(), ARCHITECTURE)
        return built_once(directory, unit.replace(".cu", ".ptx"), key, make).read_text()

    units = [name for name in included if name.endswith(".cu") and name != "driver.cu"]
    with ThreadPoolExecutor(2) as two:
        return dict(zip(units, two.map(ptx, units), strict=True))


def _sources_of(csrc: Path) -> list[Path]:
    found = [
        *csrc.glob("*.h"),
        *csrc.glob("cuda/*.h"),
        *csrc.glob("cuda/*.cu"),
        csrc / "python/cuda_module.cpp",
    ]
    return sorted(found)


def _make_cuda(target: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as two:

        def compiled(source: Path) -> Path:
            to = Path(folder, f"{source.name}.o")
            if (
                source.name == "cuda_module.cpp"
            ):  # pybind11 takes longest to optimise, and is not what is tested
                definitions = [
                    '-DSPARSEOPT_CUDA_VERSION="13.0"',
                    "-DSPARSEOPT_CUDA_ARCHITECTURES=",
                    "-DSPARSEOPT_CUDA_PTX=",
                ]
                run([str(compiler()), *_SHARED, "-O0", *_INCLUDES, *definitions, "-c", "-o", to, source])
            else:
                _nvcc("-Xcompiler=-fPIC,-fvisibility=hidden", "-c", "-o", to, source)
            return to

        units = [path for path in _sources_of(SOURCES) if path.suffix != ".h"]
        objects = [*two.map(compiled, [*units[::-1], HERE / "recording_runtime.cpp"])]
        run([str(compiler()), "-shared", "-Wl,-Bsymbolic", "-o", target, *objects])


def _nvcc(*arguments: str | Path) -> None:
    assert NVCC is not None
    code = f"arch=compute_{ARCHITECTURE},code=compute_{ARCHITECTURE}"
    run([NVCC, "-std=c++17", *flags(), "-gencode", code, *arguments])
