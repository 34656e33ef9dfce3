"""Triton's launcher over a CUDA driver that does nothing: kernels are compiled and launched, but do not run.

It needs a C compiler, but no GPU.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from unittest.mock import patch

_SOURCE = Path(__file__).with_suffix(".c")


def compiler() -> str | None:
    return shutil.which("cc") or shutil.which("gcc")


@contextmanager
def active() -> Iterator[Callable[[], int]]:
    """Make Triton launch to the stand-in of an H100; yield a function that returns the number of launches."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
    from triton.runtime import driver

    class StandIn(CudaDriver):  # type: ignore[misc]
        def __init__(self) -> None:
            self.launcher_cls = CudaLauncher
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0
            self.get_current_target = lambda: GPUTarget("cuda", 90, 32)
            self.get_device_capability = lambda device: (9, 0)

    folder, library = _library()
    with patch.dict(os.environ, TRITON_LIBCUDA_PATH=folder, TRITON_CACHE_DIR=str(Path(folder, "cache"))):
        stand_in = StandIn()
        former = driver._active
        driver.set_active(stand_in)
        stand_in.utils = CudaUtils()
        try:
            yield lambda: int(ctypes.c_long.in_dll(library, "stand_in_launches").value)
        finally:
            driver._active = former


@cache
def _library() -> tuple[str, ctypes.CDLL]:
    """Return the folder of the stand-in's libcuda.so.1 and the library. It is never unloaded, because modules
    that Triton links to it are not, either."""
    folder = tempfile.mkdtemp(prefix="stand_in_driver_")
    library = Path(folder, "libcuda.so.1")
    command = [str(compiler()), "-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", str(_SOURCE)]
    subprocess.run([*command, "-o", str(library)], check=True)
    Path(folder, "libcuda.so").symlink_to(library.name)
    return folder, ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
