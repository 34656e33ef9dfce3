"""Atomic writes: whenever the process is killed, a file is complete or absent."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write_atomically(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Replace the file ``path`` by ``content``, or leave it as it was.

    Args:
        path: its folder must exist. A leftover of a killed process, ``<name>.tmp``, is overwritten.
        content: the whole file.
        durable: wait until the content is on the disk, so that it survives a power cut.

    Raises:
        OSError: it cannot be written (a full disk, say). The former file is untouched, and no temporary file
            is left.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if durable:
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable, on systems that can open a folder; on others do nothing."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
