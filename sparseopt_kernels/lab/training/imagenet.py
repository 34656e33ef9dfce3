"""ImageNet as a folder of pictures, ``train/CLASS/*.JPEG`` and ``val/CLASS/*.JPEG``, read while training.

Pillow decodes them in the worker processes of a ``torch.utils.data.DataLoader``. ``augmentation.py`` draws
the random crops.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as MapDataset

from ...topology.seeding import generator
from .augmentation import random_crop
from .errors import TrainingError

# The usual mean and standard deviation of ImageNet's pixels, in [0, 1].
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SIZE = 224  # pixels, side of the network's input
_SHORT_SIDE = 256  # pixels, of a test picture before its centre is cropped
_SUFFIXES = (".jpeg", ".jpg", ".png")
_TEST_BATCH = 128

_Transform = Callable[[int, Path], Tensor]


class ImageNet:
    """ImageNet in a folder. The classes are the names of the folders in ``train``, in alphabetical order.

    Training images are random crops (see :func:`.augmentation.random_crop`), scaled to 224x224 and flipped
    half of the time. Test images are the central 224x224 of the picture scaled to a short side of 256.

    Args:
        folder: the folder that has ``train`` and ``val``.
        workers: processes that read and decode; with 0, this process does.

    Raises:
        TrainingError: a folder is missing, a class has no pictures, or ``val`` has a class that ``train`` has
            not.
    """

    image_shape = (3, _SIZE, _SIZE)

    def __init__(self, folder: Path, workers: int) -> None:
        classes = _classes(folder / "train")
        test_classes = _classes(folder / "val")
        if unknown := sorted(set(test_classes) - set(classes)):
            raise TrainingError(
                f"{folder / 'val'} has classes that {folder / 'train'} has not: {', '.join(unknown[:5])}"
            )
        self._train = [(path, label) for label, name in enumerate(classes) for path in classes[name]]
        number = {name: label for label, name in enumerate(classes)}
        self._test = [(path, number[name]) for name, paths in test_classes.items() for path in paths]
        self.num_classes = len(classes)
        self._workers = workers
        self._device = torch.device("cpu")

    @property
    def train_size(self) -> int:
        return len(self._train)

    @property
    def test_size(self) -> int:
        return len(self._test)

    def to(self, device: torch.device) -> ImageNet:
        moved = copy(self)
        moved._device = device
        return moved

    def train_batches(
        self, batches: Sequence[Tensor], seed: int, epoch: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        transform = partial(_for_training, seed, epoch)
        yield from self._batches(_Pictures(self._train, transform), [b.tolist() for b in batches])

    def test_batches(self, rank: int, ranks: int) -> Iterator[tuple[Tensor, Tensor]]:
        indices = list(range(rank, self.test_size, ranks))
        batches = [indices[i : i + _TEST_BATCH] for i in range(0, len(indices), _TEST_BATCH)]
        yield from self._batches(_Pictures(self._test, _for_testing), batches)

    def _batches(self, pictures: _Pictures, batches: list[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            pictures,
            batch_sampler=batches,
            num_workers=self._workers,
            pin_memory=self._device.type == "cuda",
            # The loader draws a number that is not used; it must not come from the run's random state.
            generator=torch.Generator(),
        )
        mean = torch.tensor(_MEAN, device=self._device).view(1, 3, 1, 1) * 255
        std = torch.tensor(_STD, device=self._device).view(1, 3, 1, 1) * 255
        for images, labels in loader:
            # Moved as bytes, which are a quarter of the size of floats.
            images = images.to(self._device, non_blocking=True).float()
            yield (images - mean) / std, labels.to(self._device, non_blocking=True)


class _Pictures(MapDataset[tuple[Tensor, int]]):
    """A data set of picture files. An item is the transformed picture and its label."""

    def __init__(self, files: Sequence[tuple[Path, int]], transform: _Transform) -> None:
        self.files = files
        self.transform = transform

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        try:
            return self.transform(index, path), label
        except OSError as error:
            raise TrainingError(f"cannot decode {path}: {error}. Replace or remove it", 1) from error


def _for_training(seed: int, epoch: int, index: int, path: Path) -> Tensor:
    """Return a random crop, ``(3, 224, 224)`` uint8. Each picture has a generator of its own."""
    from PIL import Image

    draws = generator(seed, -2 - index, epoch)  # layers have the numbers from 0 on, CropAndFlip has -1
    with Image.open(path) as image:
        picture = image.convert("RGB")
    width, height = picture.size
    box = random_crop(width, height, draws)
    picture = picture.resize((_SIZE, _SIZE), Image.Resampling.BILINEAR, box=box)
    if int(torch.randint(2, (), generator=draws)):
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return _pixels(picture.tobytes())


def _for_testing(index: int, path: Path) -> Tensor:
    from PIL import Image

    with Image.open(path) as image:
        picture = image.convert("RGB")
    width, height = picture.size
    scale = _SHORT_SIDE / min(width, height)
    width, height = max(_SHORT_SIDE, round(width * scale)), max(_SHORT_SIDE, round(height * scale))
    picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    left, upper = (width - _SIZE) // 2, (height - _SIZE) // 2
    return _pixels(picture.crop((left, upper, left + _SIZE, upper + _SIZE)).tobytes())


def _pixels(content: bytes) -> Tensor:
    """Return ``(3, 224, 224)`` uint8 from the bytes red, green, blue of pixel after pixel."""
    pixels = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return pixels.view(_SIZE, _SIZE, 3).permute(2, 0, 1).contiguous()


def _classes(folder: Path) -> dict[str, list[Path]]:
    """Return the pictures of each class, both in alphabetical order."""
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError as error:
        raise TrainingError(
            f"cannot read {folder} ({error.strerror}): --data-dir must name a folder with train/CLASS/*.JPEG "
            "and val/CLASS/*.JPEG"
        ) from error
    if len(names) < 2:
        raise TrainingError(f"{folder} has {len(names)} folders of classes, it must have at least 2")
    classes = {
        name: sorted(
            Path(entry.path) for entry in os.scandir(folder / name) if entry.name.lower().endswith(_SUFFIXES)
        )
        for name in names
    }
    if empty := [name for name, paths in classes.items() if not paths]:
        raise TrainingError(
            f"{folder} has classes without pictures ({', '.join(empty[:5])}; {len(empty)} of {len(names)}): "
            f"they must have files that end in {', '.join(_SUFFIXES)}"
        )
    return classes
