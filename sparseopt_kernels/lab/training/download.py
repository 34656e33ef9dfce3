"""Downloads a file of a data set, checks its checksum and keeps it in a folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path

from ..atomic import write_atomically
from .errors import TrainingError

_TIMEOUT_SECONDS = 30


def cache_folder(dataset: str) -> Path:
    """Return the folder in which downloads of a data set are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sparseopt_kernels" / dataset


def download(
    name: str,
    mirrors: Sequence[str],
    folder: Path,
    *,
    algorithm: str,
    digest: str,
    size: int,
    ways: str,
) -> Path:
    """Download ``name`` from the first mirror that has it with the right checksum.

    Args:
        name: the name of the file.
        mirrors: addresses that the name is appended to.
        folder: the folder in which it is kept; made if need be.
        algorithm: of the checksum, ``"md5"`` or ``"sha256"``.
        digest: the checksum, in hexadecimal digits.
        size: the largest size in bytes, which the disk must have free.
        ways: other ways to get the data, for error messages.

    Raises:
        TrainingError: no mirror has it, the checksum is wrong, or the disk is too small. Nothing is kept.
    """
    _check_disk(name, folder, size)
    failures = []
    for mirror in mirrors:
        print(f"downloading {mirror}{name}", file=sys.stderr)
        try:
            with urllib.request.urlopen(mirror + name, timeout=_TIMEOUT_SECONDS) as response:
                content: bytes = response.read(size + 1)
        except (OSError, HTTPException) as error:
            failures.append(f"  {mirror}{name}: {error}")
            continue
        found = hashlib.new(algorithm, content, usedforsecurity=False).hexdigest()
        if found == digest:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                write_atomically(folder / name, content)
            except OSError as error:
                raise TrainingError(f"cannot keep the download in {folder}: {error}") from error
            return folder / name
        kind = {"md5": "MD5", "sha256": "SHA-256"}[algorithm]
        failures.append(
            f"  {mirror}{name}: the checksum is wrong ({kind} {found}, it must be {digest}); nothing was kept"
        )
    raise TrainingError("\n".join([f"cannot download {name}:", *failures, ways]))


def _check_disk(name: str, folder: Path, size: int) -> None:
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < size:
        raise TrainingError(
            f"{name} needs {size / 1e6:.0f} MB in {folder}, and the disk has {free / 1e6:.0f} MB left: make "
            "room, or set XDG_CACHE_HOME to a folder on a larger disk"
        )
