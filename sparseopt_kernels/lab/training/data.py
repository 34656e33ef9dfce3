"""Data sets: training batches in a given order, and test batches.

The data sets here are held in memory, normalised. ``imagenet.py`` reads its files while training;
``fashion_mnist.py`` and ``cifar100.py`` find and download files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from . import cifar100, fashion_mnist
from .augmentation import CropAndFlip
from .errors import TrainingError
from .imagenet import ImageNet

DATASETS = ("digits", "fashion-mnist", "cifar-100", "imagenet")
_TEST_BATCH = 1000


class Data(Protocol):
    """A data set. Batches are images ``(B, channels, height, width)`` float32, normalised, and labels
    ``(B,)`` int64."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""

    @property
    def num_classes(self) -> int: ...

    @property
    def train_size(self) -> int:
        """The number of training examples."""

    @property
    def test_size(self) -> int: ...

    def to(self, device: torch.device) -> Data:
        """Return the data set with its batches on a device."""

    def train_batches(
        self, batches: Sequence[Tensor], seed: int, epoch: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images and labels of each batch.

        Args:
            batches: the indices of the examples, a tensor ``(B,)`` for each batch.
            seed: of the augmentation. The random numbers of an example depend only on ``seed``, ``epoch`` and
                its index: they are the same in any order, on any rank and after a resume.
            epoch: counted from 0.
        """

    def test_batches(self, rank: int, ranks: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every ``ranks``-th test example, from index ``rank`` on, in batches."""


@dataclass(frozen=True)
class Dataset:
    """A data set in memory, all on one device: images ``(N, channels, height, width)`` float32, labels
    ``(N,)`` int64. ``augment`` changes the training images, differently in every epoch."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    augment: CropAndFlip | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    @property
    def num_classes(self) -> int:
        return int(self.train_labels.max()) + 1

    def first(self, train: int, test: int) -> Dataset:
        """Return a data set of at most the first ``train`` training and the first ``test`` test examples."""
        return replace(
            self,
            train_images=self.train_images[:train],
            train_labels=self.train_labels[:train],
            test_images=self.test_images[:test],
            test_labels=self.test_labels[:test],
        )

    @property
    def train_size(self) -> int:
        return len(self.train_labels)

    @property
    def test_size(self) -> int:
        return len(self.test_labels)

    def to(self, device: torch.device) -> Dataset:
        return replace(
            self,
            train_images=self.train_images.to(device),
            train_labels=self.train_labels.to(device),
            test_images=self.test_images.to(device),
            test_labels=self.test_labels.to(device),
        )

    def train_batches(
        self, batches: Sequence[Tensor], seed: int, epoch: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        drawn = self.augment.draw(self.train_size, seed, epoch) if self.augment else None
        for indices in batches:
            at = indices.to(self.train_images.device)
            images = self.train_images[at]
            if self.augment and drawn is not None:
                images = self.augment(images, drawn[indices])
            yield images, self.train_labels[at]

    def test_batches(self, rank: int, ranks: int) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.test_images[rank::ranks], self.test_labels[rank::ranks]
        yield from zip(torch.split(images, _TEST_BATCH), torch.split(labels, _TEST_BATCH), strict=True)


def open_dataset(name: str, data_dir: str | None = None, loader_workers: int = 0) -> Data:
    """Return the data set ``name`` of :data:`DATASETS`, in memory or read from files.

    Args:
        name: as in :func:`load_dataset`, or ``"imagenet"``.
        data_dir: as in :func:`load_dataset`; required for ``"imagenet"``.
        loader_workers: processes that read and decode images, for ``"imagenet"``.

    Raises:
        TrainingError: the data are not found, or not valid.
    """
    if name != "imagenet":
        return load_dataset(name, data_dir)
    if not data_dir:
        raise TrainingError(
            "imagenet cannot be downloaded without an account: name the folder that has train/CLASS/*.JPEG "
            "and val/CLASS/*.JPEG with --data-dir"
        )
    return ImageNet(Path(data_dir), loader_workers)


def load_dataset(name: str, data_dir: str | None = None) -> Dataset:
    """Return the data set ``name``, one of :data:`DATASETS` except ``"imagenet"``, on the CPU.

    Args:
        name: ``"digits"`` (1,797 images of 8x8, from scikit-learn), ``"fashion-mnist"`` (70,000 of 28x28)
            or ``"cifar-100"`` (60,000 of 3x32x32, with random crops and flips).
        data_dir: the folder of ``"fashion-mnist"`` or ``"cifar-100"``; for the default see
            :mod:`.fashion_mnist` and :mod:`.cifar100`.

    Raises:
        TrainingError: the data are not found, or damaged.
    """
    folder = Path(data_dir) if data_dir else None
    if name == "digits":
        return _digits()
    if name == "fashion-mnist":
        return _grey(*fashion_mnist.load(folder))
    if name == "cifar-100":
        return _coloured(*cifar100.load(folder))
    raise TrainingError(f"--data is {name!r}, it must be one of {', '.join(DATASETS)}")


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float()
    labels = torch.from_numpy(digits.target).long()
    test = _every_third_of_each_class(labels)
    return _grey(images[~test], labels[~test], images[test], labels[test])


def _every_third_of_each_class(labels: Tensor) -> Tensor:
    """Return a stratified test split, boolean ``(N,)``, without random numbers: it is always the same."""
    chosen = torch.zeros(labels.shape, dtype=torch.bool)
    for label in range(int(labels.max()) + 1):
        chosen[(labels == label).nonzero().flatten()[2::3]] = True
    return chosen


def _grey(train_images: Tensor, train_labels: Tensor, test_images: Tensor, test_labels: Tensor) -> Dataset:
    """Normalise grey images ``(N, height, width)`` to mean 0 and variance 1 over the training set."""
    train, test = train_images.float().unsqueeze(1), test_images.float().unsqueeze(1)
    std, mean = torch.std_mean(train)
    return Dataset(
        train_images=(train - mean) / std,
        train_labels=train_labels.long(),
        test_images=(test - mean) / std,
        test_labels=test_labels.long(),
    )


def _coloured(
    train_images: Tensor, train_labels: Tensor, test_images: Tensor, test_labels: Tensor
) -> Dataset:
    """Normalise images ``(N, 3, height, width)`` to mean 0 and variance 1 in each channel over the training
    set, and augment them by random crops, with a black border of 4 pixels, and random flips."""
    train, test = train_images.float(), test_images.float()
    std, mean = torch.std_mean(train, dim=(0, 2, 3), keepdim=True)
    return Dataset(
        train_images=(train - mean) / std,
        train_labels=train_labels.long(),
        test_images=(test - mean) / std,
        test_labels=test_labels.long(),
        augment=CropAndFlip(padding=4, fill=tuple((-mean / std).flatten().tolist())),
    )


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Return the number of batches that :func:`split_order` makes."""
    return -(-examples // batch_size)


def split_order(order: Tensor, batch_size: int) -> tuple[Tensor, ...]:
    """Split the examples, in the given order, into batches of at most ``batch_size``.

    The batches differ in size by at most one: a short last batch would disturb batch normalisation.
    """
    return order.tensor_split(steps_per_epoch(len(order), batch_size))
