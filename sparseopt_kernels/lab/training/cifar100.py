"""Finds or downloads CIFAR-100, and reads its binary files.

It is taken from the user's folder if one is named, else from the cache, into which the official archive is
downloaded if need be. The archive is read without being unpacked onto the disk.
"""

from __future__ import annotations

import hashlib
import tarfile
import zlib
from pathlib import Path

import torch
from torch import Tensor

from . import download
from .errors import TrainingError

ARCHIVE = "cifar-100-binary.tar.gz"
# The MD5 sum that https://www.cs.toronto.edu/~kriz/cifar.html gives for the binary version, and its bytes.
MD5 = "03b5dce01913d631647c71ecec9e9cb8"
ARCHIVE_BYTES = 168_513_733
MIRRORS = ("https://www.cs.toronto.edu/~kriz/",)
_FOLDER = "cifar-100-binary"  # in the archive
_FILES = ("train.bin", "test.bin")
_SHAPE = (3, 32, 32)
_RECORD = 2 + 3 * 32 * 32  # bytes: coarse label, fine label, then red, green and blue
_CLASSES = 100

_WAYS = f"""CIFAR-100 can be had in two ways:
  - with a network: run the same command again, and it is downloaded and checked;
  - copy {ARCHIVE} from https://www.cs.toronto.edu/~kriz/cifar.html into a folder, unpacked or not, and
    name it with --data-dir FOLDER."""


def load(data_dir: Path | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images and labels, test images and labels: uint8, ``(N, 3, 32, 32)`` and ``(N,)``.

    The labels are the 100 fine ones.

    Args:
        data_dir: a folder with the archive, or with ``train.bin`` and ``test.bin``.

    Raises:
        TrainingError: a file is missing and cannot be downloaded, or has a wrong checksum or content.
    """
    folder = data_dir or download.cache_folder("cifar-100")
    for unpacked in (folder, folder / _FOLDER):
        paths = [unpacked / name for name in _FILES]
        if all(path.is_file() for path in paths):
            train, test = (_read(path) for path in paths)
            return *_records(train, paths[0]), *_records(test, paths[1])
    archive = folder / ARCHIVE
    if not archive.is_file():
        if data_dir:
            raise TrainingError(
                f"--data-dir {data_dir} has neither {ARCHIVE} nor {' and '.join(_FILES)}.\n{_WAYS}"
            )
        archive = download.download(
            ARCHIVE, MIRRORS, folder, algorithm="md5", digest=MD5, size=ARCHIVE_BYTES, ways=_WAYS
        )
    train, test = _unpack(archive)
    return *_records(train, archive / _FILES[0]), *_records(test, archive / _FILES[1])


def _unpack(archive: Path) -> tuple[bytes, bytes]:
    """Return the content of ``train.bin`` and ``test.bin`` in the archive."""
    # Checked on each load: a copy may have been cut short, and training takes much longer than this.
    found = hashlib.md5(_read(archive), usedforsecurity=False).hexdigest()
    if found != MD5:
        raise TrainingError(
            f"the checksum of {archive} is wrong (MD5 {found}, it must be {MD5}): remove it.\n{_WAYS}"
        )
    try:
        with tarfile.open(archive) as tar:
            members = [tar.extractfile(f"{_FOLDER}/{name}") for name in _FILES]
            train, test = (member.read() if member else b"" for member in members)
    except (OSError, KeyError, EOFError, tarfile.TarError, zlib.error) as error:
        raise TrainingError(f"cannot read {archive}: {error}") from error
    return train, test


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TrainingError(f"cannot read {path}: {error}") from error


def _records(content: bytes, source: Path) -> tuple[Tensor, Tensor]:
    if not content or len(content) % _RECORD:
        raise TrainingError(
            f"{source} is damaged: it has {len(content):,} bytes, it must be one or more records of "
            f"{_RECORD:,}.\n{_WAYS}"
        )
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, _RECORD)
    labels = records[:, 1]
    if int(labels.max()) >= _CLASSES:
        raise TrainingError(
            f"{source} is damaged: it has a label {labels.max()}, it must be below {_CLASSES}.\n{_WAYS}"
        )
    return records[:, 2:].reshape(-1, *_SHAPE), labels.clone()
