"""Finds the programs of a CUDA toolkit."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

# Packages of PyPI such as nvidia-cuda-nvcc, then where toolkits are installed.
_FOLDERS = (
    f"{sysconfig.get_path('purelib')}/nvidia/cu*/bin",
    "/usr/local/cuda/bin",
    "/usr/local/cuda/compute-sanitizer",
    "/opt/nvidia/nsight-compute/*",
)


def tool(name: str) -> str | None:
    """Return the path of a program such as ``nvcc``.

    The ``PATH`` comes first, then ``CUDA_HOME``. Of several versions, the name that sorts last is taken.
    """
    folders = []
    if os.environ.get("CUDA_HOME"):
        folders.append(Path(os.environ["CUDA_HOME"], "bin"))
    for pattern in _FOLDERS:
        folders += sorted(Path("/").glob(pattern[1:]), reverse=True)
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(map(str, folders)))
