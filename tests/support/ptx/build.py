"""Compiles what executes PTX, and the CUDA backend by nvcc: its host code, and the PTX of its kernels."""

from __future__ import annotations

import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from built_once import built_once, key_of, run
from cuda_code import NVCC, flags
from cuda_on_cpu.build import CSRC, Substitution, compiler, cuda_sources, settings

HERE = Path(__file__).parent.resolve()
ARCHITECTURE = 90
NO_NVCC = "there is no nvcc: pip install nvidia-cuda-nvcc, or put that of a CUDA toolkit on the PATH"
_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
_INCLUDES = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
_MODULE = ["-std=c++17", "-fPIC", "-fvisibility=hidden"]
# The machine rounds as instructions say, and changes the way to round.
_MACHINE = ["-O1", "-march=native", "-ffp-contract=off", "-frounding-math", "-shared", "-Wall", "-Wextra"]
_DEFINITIONS = [
    f'-DSPARSEOPT_CUDA_VERSION="{ARCHITECTURE}"',
    "-DSPARSEOPT_CUDA_ARCHITECTURES=",
    "-DSPARSEOPT_CUDA_PTX=",
]


def why_no_machine() -> str | None:
    """The reason why no PTX can be executed here."""
    return None if compiler() else "there is no C++ compiler"


def why_no_cuda() -> str | None:
    """The reason why the CUDA backend cannot be compiled by nvcc and executed here."""
    return why_no_machine() or (None if NVCC else NO_NVCC)


def build_machine(directory: Path) -> Path:
    """The path of the module ``_machine``, in ``directory``, where it is kept from run to run."""

    def make(target: Path) -> None:
        run([str(compiler()), *_MODULE, *_MACHINE, *_INCLUDES, "-o", target, HERE / "machine.cpp"])

    texts = [path.read_text() for path in sorted([*HERE.glob("*.h"), HERE / "machine.cpp"])]
    key = key_of(texts, settings())
    return built_once(directory, f"_machine{_SUFFIX}", key, make)


def build_cuda(directory: Path) -> Path:
    """The path of the module ``_cuda``, whose launches go to the recording runtime beside this file."""
    runtime = HERE / "recording_runtime.cpp"
    sources = cuda_sources()
    key = key_of(_named(sources), runtime.read_text(), _nvcc_settings(), settings())

    def compiled(source: Path, folder: str) -> Path:
        to = Path(folder, f"{source.name}.o")
        if source.name == "cuda_module.cpp":  # pybind11 takes longest to optimise, and is not what is tested
            run([str(compiler()), *_MODULE, "-O0", *_INCLUDES, *_DEFINITIONS, "-c", "-o", to, source])
        else:
            _nvcc("-Xcompiler=-fPIC,-fvisibility=hidden", "-c", "-o", to, source)
        return to

    def make(target: Path) -> None:
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as two:
            units = [runtime, *(path for path in sources if path.suffix != ".h")]
            objects = two.map(lambda unit: compiled(unit, folder), reversed(units))
            run([str(compiler()), "-shared", "-Wl,-Bsymbolic", "-o", target, *objects])

    return built_once(directory, f"_cuda{_SUFFIX}", key, make)


def build_ptx(directory: Path, substitutions: Sequence[Substitution] = ()) -> list[str]:
    """The PTX of the files of csrc/cuda, in which ``substitutions`` are made."""
    sources = cuda_sources(substitutions)
    units = [path for path in sources if path.suffix == ".cu" and path.name != "driver.cu"]
    key = key_of(_named(sources), _nvcc_settings())

    def ptx(unit: Path) -> str:
        def make(target: Path) -> None:
            with tempfile.TemporaryDirectory() as folder:
                root = Path(folder)
                for path, text in sources.items():
                    copy = root / path.relative_to(CSRC)
                    copy.parent.mkdir(exist_ok=True)
                    copy.write_text(text)
                _nvcc("-ptx", "-o", target, root / unit.relative_to(CSRC))

        return built_once(directory, f"{unit.stem}.ptx", key, make).read_text()

    with ThreadPoolExecutor(2) as two:
        return [*two.map(ptx, units)]


def _named(sources: dict[Path, str]) -> dict[str, str]:
    return {path.name: text for path, text in sources.items()}


def _nvcc_settings() -> tuple[str, list[str], int]:
    assert NVCC is not None
    version = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    return version, flags(), ARCHITECTURE


def _nvcc(*arguments: str | Path) -> None:
    assert NVCC is not None
    code = f"arch=compute_{ARCHITECTURE},code=compute_{ARCHITECTURE}"
    run([NVCC, "-std=c++17", *flags(), "-gencode", code, *arguments])
