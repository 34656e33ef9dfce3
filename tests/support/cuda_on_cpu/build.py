"""Builds ``_cuda`` from csrc as C++ against the stand-in beside this file, and loads it.

A module is compiled once per content of its sources. ``substitutions`` change these.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pybind11
from built_once import built_once, key_of, run

HERE = Path(__file__).parent.resolve()
ROOT = HERE.parents[2]
CSRC = ROOT / "csrc"

# As on a GPU, multiply-adds are fused where update_rule.h asks for it (if the CPU can) and nowhere else.
FLAGS: tuple[str, ...] = (
    "-std=c++17",
    "-O2",
    "-march=native",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
)
# Fibres jump from stack to stack, which a fortified longjmp refuses.
FLAGS += ("-U_FORTIFY_SOURCE", "-fno-math-errno", "-Wall", "-Wextra", "-Wno-unknown-pragmas")
# Vectors are read where other types were written, and must be aligned, as on a GPU.
KERNEL_FLAGS = (
    "-x",
    "c++",
    "-fno-strict-aliasing",
    "-fsanitize=alignment",
    "-fno-sanitize-recover=alignment",
)
BINDING_FLAGS = ("-O0",)  # pybind11 takes longest to optimise, and is not what is tested
DEFINITIONS = (
    '-DSPARSEOPT_CUDA_VERSION="on the CPU"',
    "-DSPARSEOPT_CUDA_ARCHITECTURES=",
    "-DSPARSEOPT_CUDA_PTX=",
)


class Substitution(NamedTuple):
    """In ``path`` (relative to csrc), ``old``, which must be there once, becomes ``new``."""

    path: str
    old: str
    new: str


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def fuses_multiply_adds() -> bool:
    """Tell if what is compiled here fuses them, as a GPU does: see ``multiply_add`` in update_rule.h."""
    macros = settings()[0]
    return any(b"#define " + name in macros for name in (b"__FMA__ ", b"__aarch64__ ", b"__FP_FAST_FMA "))


def build(directory: Path, substitutions: Sequence[Substitution] = (), declarations: str = "") -> Path:
    """The path of the compiled module, in ``directory``, where it is kept from run to run.

    ``declarations`` are put before each source that ``substitutions`` change.
    """
    sources = cuda_sources(substitutions)
    for name in {substitution.path for substitution in substitutions}:
        sources[CSRC / name] = f"{declarations}\n{sources[CSRC / name]}"
    return _build(directory, f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}", sources)


def cuda_sources(substitutions: Sequence[Substitution] = ()) -> dict[Path, str]:
    """The sources of ``_cuda`` by their paths, in which ``substitutions`` are made."""
    files = sorted([*CSRC.glob("*.h"), *CSRC.glob("cuda/*"), CSRC / "python" / "cuda_module.cpp"])
    sources = {path: path.read_text() for path in files if path.suffix in (".h", ".cu", ".cpp")}
    for name, old, new in substitutions:
        text = sources[CSRC / name]
        if text.count(old) != 1:
            raise ValueError(f"{old!r} is {text.count(old)} times in {name}, it must be there once")
        sources[CSRC / name] = text.replace(old, new)
    return sources


def build_probes(directory: Path) -> Path:
    """The path of a library of small kernels that test the stand-in itself."""
    probes = HERE / "probes.cu"
    return _build(directory, "probes.so", {probes: probes.read_text()})


def _build(directory: Path, name: str, sources: dict[Path, str]) -> Path:
    """Compile the units among ``sources``, with the stand-in, unless that was done before."""
    sources = {
        **sources,
        **{HERE / own: (HERE / own).read_text() for own in ("cuda_runtime.h", "runtime.cpp")},
    }
    units = [path for path in sources if path.suffix != ".h"]
    own = settings()
    keys = [key_of(own, *sorted(_included(unit, sources).items())) for unit in units]
    return built_once(
        directory,
        name,
        key_of(*keys),
        lambda target: _link(directory, target, sources, dict(zip(units, keys, strict=True))),
    )


def _link(directory: Path, target: Path, sources: dict[Path, str], keys: dict[Path, str]) -> None:
    """Compile those units whose objects are not in ``directory`` yet, by their keys, and link all."""
    with tempfile.TemporaryDirectory(dir=directory) as scratch, ThreadPoolExecutor(max_workers=2) as pool:
        root = Path(scratch)
        for path, text in sources.items():
            (root / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            (root / path.relative_to(ROOT)).write_text(text)
        objects = {unit: directory / f"{key}.o" for unit, key in keys.items()}
        list(pool.map(lambda unit: _compile(root, unit.relative_to(ROOT), objects[unit]), objects))
        run([_cxx(), "-shared", "-o", f"{root}/built.so", *map(str, objects.values())])
        shutil.copy(root / "built.so", target)


def settings() -> tuple[Any, ...]:
    """What else an object depends on; the compiler's macros say what it takes this machine for."""
    command = [_cxx(), *FLAGS, "-dM", "-E", "-x", "c++", "/dev/null"]
    macros = subprocess.run(command, check=True, capture_output=True).stdout
    return macros, FLAGS, KERNEL_FLAGS, BINDING_FLAGS, DEFINITIONS, pybind11.__version__, sys.version


def _included(unit: Path, sources: dict[Path, str]) -> dict[Path, str]:
    """The unit and those of ``sources`` that it includes: what did not change is not compiled again."""
    found: dict[Path, str] = {}
    waiting = [unit]
    while waiting:
        path = waiting.pop()
        if path in found or path not in sources:
            continue
        found[path] = sources[path]
        names = re.findall(r'#include ["<]([^">]+)', sources[path])
        waiting += [HERE / name for name in names] + [(path.parent / name).resolve() for name in names]
    return found


def _cxx() -> str:
    found = compiler()
    if found is None:
        raise RuntimeError("no C++ compiler found")
    return found


def _compile(root: Path, unit: Path, target: Path) -> None:
    if target.exists():
        return
    flags = KERNEL_FLAGS if unit.suffix == ".cu" else BINDING_FLAGS if unit.parent.name == "python" else ()
    includes = [f"-I{path}" for path in (HERE, pybind11.get_include(), sysconfig.get_path("include"))]
    made = root / f"{unit.name}.o"
    run([_cxx(), *FLAGS, *DEFINITIONS, *includes, *flags, "-c", str(root / unit), "-o", str(made)])
    made.replace(target)
