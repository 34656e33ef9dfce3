"""Files that are there as a whole or not at all, whenever the process is killed."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write_atomically(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Put ``content`` in the place of the file ``path``, or leave that file as it was.

    Args:
        path: its folder must exist. A leftover of a killed process, ``<name>.tmp``, is overwritten.
        content: the whole file.
        durable: wait until the disk has it, so that a power cut loses nothing either.

    Raises:
        OSError: the disk is full, say. The former file is untouched, and no temporary file is left.
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
    """Make a rename last. Not every system can open a folder; where not, the rename is all one gets."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
