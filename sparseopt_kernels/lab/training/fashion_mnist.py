"""Finds or downloads the four files of Fashion-MNIST, and reads them.

They are taken from the user's folder if one is named, else from the folder of Debian's package
``dataset-fashion-mnist``, else from the cache, into which they are downloaded if need be.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from . import download
from .errors import TrainingError

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")

# SHA-256 of the files whose MD5 sums are in the README of the first mirror's repository. Because of this
# check the second mirror, which has no https, is as safe as the first.
SHA256 = {
    "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}
MIRRORS = (
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
)
_CLASSES = 10
_LARGEST_FILE = 1 << 25  # bytes: the largest of the four has 26 million

_WAYS = f"""Fashion-MNIST can be had in three ways:
  - on Debian or Ubuntu: apt install dataset-fashion-mnist (it is then found in {DEBIAN_FOLDER});
  - with a network: run the same command again, and it is downloaded and checked;
  - copy {", ".join(SHA256)} from https://github.com/zalandoresearch/fashion-mnist (data/fashion) into a
    folder, and name it with --data-dir FOLDER."""


def load(data_dir: Path | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images and labels, test images and labels: uint8, ``(N, 28, 28)`` and ``(N,)``.

    Args:
        data_dir: a folder with the four files, as they are or unpacked (without ``.gz``).

    Raises:
        TrainingError: a file is missing and cannot be downloaded, or has a wrong checksum or content.
    """
    files = _files(data_dir)
    train_images, train_labels, test_images, test_labels = map(read_idx, files)
    for images, labels in ((train_images, train_labels), (test_images, test_labels)):
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or len(images) < 2:
            raise TrainingError(
                f"the files in {files[0].parent} do not fit together: images of shape {tuple(images.shape)}, "
                f"labels of shape {tuple(labels.shape)}.\n{_WAYS}"
            )
        if int(labels.max()) >= _CLASSES:
            raise TrainingError(
                f"the files in {files[0].parent} have a label {labels.max()}, it must be below {_CLASSES}.\n"
                f"{_WAYS}"
            )
    return train_images, train_labels, test_images, test_labels


def cache_folder() -> Path:
    """Return the folder in which downloads are kept."""
    return download.cache_folder("fashion-mnist")


def _files(data_dir: Path | None) -> list[Path]:
    """Return the paths of the four files, in the order of ``SHA256``; download those that are missing."""
    for folder in [data_dir] if data_dir else [DEBIAN_FOLDER, cache_folder()]:
        found = [_find(folder, name) for name in SHA256]
        if all(found):
            return [path for path in found if path]
    if data_dir:
        missing = [name for name in SHA256 if _find(data_dir, name) is None]
        raise TrainingError(f"--data-dir {data_dir} does not have {', '.join(missing)}.\n{_WAYS}")
    return [_find(cache_folder(), name) or _download(name, cache_folder()) for name in SHA256]


def _find(folder: Path, name: str) -> Path | None:
    """Return the path of the file or of its unpacked form, or None."""
    return next((p for p in (folder / name, folder / name.removesuffix(".gz")) if p.is_file()), None)


def _download(name: str, folder: Path) -> Path:
    return download.download(
        name,
        MIRRORS,
        folder,
        algorithm="sha256",
        digest=SHA256[name],
        size=_LARGEST_FILE,
        ways=_WAYS,
    )


def read_idx(path: Path) -> Tensor:
    """Return the content of an IDX file, packed with gzip or not: uint8, in the shape that its header gives.

    Raises:
        TrainingError: the file cannot be read, or is not an IDX file of unsigned bytes, or is cut short.
    """
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise TrainingError(f"cannot read {path}: {error}") from error
    # Two zero bytes, the type (8: unsigned byte), the number of dimensions, the sizes as big-endian uint32.
    if len(content) < 4 or content[:3] != b"\x00\x00\x08" or len(content) < 4 + 4 * content[3]:
        raise TrainingError(
            f"{path} is not an IDX file of unsigned bytes: its header is {content[:4].hex()!r}"
        )
    ndim = content[3]
    shape = struct.unpack(f">{ndim}I", content[4 : 4 + 4 * ndim])
    values = content[4 + 4 * ndim :]
    if len(values) != prod(shape):
        raise TrainingError(
            f"{path} is damaged: its header promises shape {shape}, but {len(values)} values follow"
        )
    if not values:
        raise TrainingError(f"{path} is empty: its header says shape {shape}")
    return torch.frombuffer(bytearray(values), dtype=torch.uint8).view(shape)
