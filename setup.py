"""Builds the native library with CMake and ninja. Everything else is in pyproject.toml."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / f"cmake-{sys.implementation.cache_tag}"
        if os.environ.get("SPARSEOPT_CUDA") == "1":
            raise RuntimeError("SPARSEOPT_CUDA is 1, but this version has no CUDA kernels")
        # cmake and ninja come as wheels: their programs are beside the interpreter's, not always on PATH.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        environment = {**os.environ, "PATH": path}
        # Fresh: pip's build environment, where a former configuration found ninja, is gone.
        configure = ["cmake", "--fresh", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        settings = {
            "CMAKE_BUILD_TYPE": "Release",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        subprocess.run(
            configure + [f"-D{name}={value}" for name, value in settings.items()],
            check=True,
            env=environment,
        )
        subprocess.run(["cmake", "--build", str(build)], check=True, env=environment)
        built = list(build.glob(f"_native*{target.suffix}"))
        if not built:  # CMake lacked something and said what
            self.warn("no C++ compiler, or no Python headers: installing without the native CPU backend")
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(built[0]), str(target))


setup(
    # "optional" lets the package be installed where there is nothing to copy: no compiler.
    ext_modules=[Extension("sparseopt_kernels._native", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
