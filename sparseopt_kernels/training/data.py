"""The data sets, as tensors: which examples train and which test, normalised, and in which order.

Where Fashion-MNIST comes from is in ``fashion_mnist.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from . import fashion_mnist
from .errors import TrainingError

DATASETS = ("digits", "fashion-mnist")


@dataclass(frozen=True)
class Dataset:
    """Images ``(N, channels, height, width)`` float32, labels ``(N,)`` int64, all on one device."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def image_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    @property
    def num_classes(self) -> int:
        return int(self.train_labels.max()) + 1

    def first(self, train: int, test: int) -> Dataset:
        """The first ``train`` training examples and the first ``test`` test examples, or all there are."""
        return Dataset(
            self.train_images[:train],
            self.train_labels[:train],
            self.test_images[:test],
            self.test_labels[:test],
        )

    def to(self, device: torch.device) -> Dataset:
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def load_dataset(name: str, data_dir: str | None = None) -> Dataset:
    """The data set ``name`` of :data:`DATASETS`, on the CPU.

    Args:
        name: ``"digits"`` (1,797 images of 8x8, from scikit-learn) or ``"fashion-mnist"`` (70,000 of
            28x28).
        data_dir: where the files of ``"fashion-mnist"`` are; without it, see :mod:`.fashion_mnist`.

    Raises:
        TrainingError: the data are nowhere to be found, or damaged.
    """
    if name == "digits":
        return _digits()
    if name == "fashion-mnist":
        return _normalised(*fashion_mnist.load(Path(data_dir) if data_dir else None))
    raise TrainingError(f"--data is {name!r}, it must be one of {', '.join(DATASETS)}")


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float()
    labels = torch.from_numpy(digits.target).long()
    test = _every_third_of_each_class(labels)
    return _normalised(images[~test], labels[~test], images[test], labels[test])


def _every_third_of_each_class(labels: Tensor) -> Tensor:
    """A split that is stratified and needs no random numbers: the same on every machine, for ever."""
    chosen = torch.zeros(labels.shape, dtype=torch.bool)
    for label in range(int(labels.max()) + 1):
        chosen[(labels == label).nonzero().flatten()[2::3]] = True
    return chosen


def _normalised(
    train_images: Tensor, train_labels: Tensor, test_images: Tensor, test_labels: Tensor
) -> Dataset:
    """Grey images ``(N, height, width)`` to mean 0 and variance 1 over the training set."""
    train, test = train_images.float().unsqueeze(1), test_images.float().unsqueeze(1)
    std, mean = torch.std_mean(train)
    return Dataset((train - mean) / std, train_labels.long(), (test - mean) / std, test_labels.long())


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """How many batches :func:`batches` makes."""
    return -(-examples // batch_size)


def batches(
    images: Tensor, labels: Tensor, batch_size: int, order: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """All examples, in the given order, in batches of at most ``batch_size``.

    The batches differ in size by at most one: a short last one would disturb batch normalisation.
    """
    for indices in order.to(images.device).tensor_split(steps_per_epoch(len(order), batch_size)):
        yield images[indices], labels[indices]
