"""Triton's launcher over a CUDA driver without a GPU: kernels are compiled and launched, but do not run.

It needs a C compiler, but no GPU.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from unittest.mock import patch

STREAM = 0x77  # on which it launches
_SOURCE = Path(__file__).with_suffix(".c")


def compiler() -> str | None:
    return shutil.which("cc") or shutil.which("gcc")


@contextmanager
def active(cache: Path | None = None) -> Iterator[ctypes.CDLL]:
    """Make Triton launch to the stand-in of an H100, whose library is yielded.

    Args:
        cache: the folder for what Triton compiles; None: one that is made anew.
    """
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
    from triton.runtime import driver

    class StandIn(CudaDriver):  # type: ignore[misc]
        def __init__(self) -> None:
            self.launcher_cls = CudaLauncher
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: STREAM
            self.get_current_target = lambda: GPUTarget("cuda", 90, 32)
            self.get_device_capability = lambda device: (9, 0)

    folder, library = _library()
    cache = cache or Path(folder, "cache")
    with patch.dict(os.environ, TRITON_LIBCUDA_PATH=folder, TRITON_CACHE_DIR=str(cache)):
        stand_in = StandIn()
        former = driver._active
        driver.set_active(stand_in)
        stand_in.utils = CudaUtils()
        try:
            yield library
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
