"""Builds the native libraries with CMake and ninja. Everything else is in pyproject.toml."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


MODULES = {"_native": "CPU", "_cuda": "CUDA"}
CUDA_SETTINGS = {"": "AUTO", "0": "OFF", "1": "ON"}


class CMakeBuild(build_ext):
    """One CMake project builds both modules; one that it left out, having said why, is not installed."""

    def build_extensions(self) -> None:
        build = Path(self.build_temp).resolve() / f"cmake-{sys.implementation.cache_tag}"
        for former in build.glob("_*.so"):
            former.unlink()
        self.build_with_cmake(build)
        for ext in self.extensions:
            target = Path(self.get_ext_fullpath(ext.name)).resolve()
            built = build / target.name
            if built.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                self.copy_file(str(built), str(target))
                continue
            # A former build left one there, or beside the sources, where an editable install has them.
            target.unlink(missing_ok=True)
            (ROOT / "sparseopt_kernels" / target.name).unlink(missing_ok=True)
            self.warn(f"installing without the {MODULES[ext.name.rpartition('.')[2]]} backend")

    def build_with_cmake(self, build: Path) -> None:
        cuda = os.environ.get("SPARSEOPT_CUDA", "")
        if cuda not in CUDA_SETTINGS:
            raise ValueError(f"SPARSEOPT_CUDA is {cuda!r}, it must be 1, 0 or not set")
        # cmake and ninja come as wheels: their programs are beside the interpreter's, not always on PATH.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        environment = {**os.environ, "PATH": path}
        # Fresh: pip's build environment, where a former configuration found ninja, is gone.
        configure = ["cmake", "--fresh", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        settings = {
            "CMAKE_BUILD_TYPE": "Release",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "SPARSEOPT_CUDA": CUDA_SETTINGS[cuda],
        }
        subprocess.run(
            configure + [f"-D{name}={value}" for name, value in settings.items()],
            check=True,
            env=environment,
        )
        subprocess.run(["cmake", "--build", str(build)], check=True, env=environment)


setup(
    # "optional" lets the package be installed where there is nothing to copy: no compiler.
    ext_modules=[Extension(f"sparseopt_kernels.{name}", sources=[], optional=True) for name in MODULES],
    cmdclass={"build_ext": CMakeBuild},
)
