"""CIFAR-100 and ImageNet in small: real pictures, in the formats of the real ones.

The pictures are those that scikit-learn ships (china.jpg and flower.jpg), cut into parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

CLASSES = ("n01_china", "n02_flower")


def parts(count: int, size: int) -> Iterator[tuple[int, Image.Image]]:
    """``count`` squares of each picture, with the number of the picture."""
    for label, pixels in enumerate(load_sample_images().images):  # 427 x 640
        for i in range(count):
            top, left = 37 * i % (427 - size), 53 * i % (640 - size)
            yield label, Image.fromarray(pixels[top : top + size, left : left + size])


def make_imagenet(folder: Path, train: int = 4, val: int = 2) -> Path:
    """``train/CLASS/*.JPEG`` and ``val/CLASS/*.JPEG`` of 256 x 256 pixels."""
    for i, (label, image) in enumerate(parts(train + val, 256)):
        number = i % (train + val)
        target = folder / ("train" if number < train else "val") / CLASSES[label]
        target.mkdir(parents=True, exist_ok=True)
        image.save(target / f"{CLASSES[label]}_{number}.JPEG", quality=95)
    return folder


def cifar100_bytes(count: int) -> bytes:
    """``count`` records of each picture, in CIFAR-100's binary format: fine labels 0 and 1, all of coarse
    label 7."""
    records = []
    for label, image in parts(count, 32):
        red_green_blue = np.asarray(image).transpose(2, 0, 1)
        records.append(bytes([7, label]) + red_green_blue.tobytes())
    return b"".join(records[i::count][j] for i in range(count) for j in range(2))


def make_cifar100(folder: Path, train: int = 16, test: int = 4) -> Path:
    """``train.bin`` and ``test.bin``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.bin").write_bytes(cifar100_bytes(train))
    (folder / "test.bin").write_bytes(cifar100_bytes(test))
    return folder
