"""Measures the ratio of a layer's gradient with a mask to that without, neuron by neuron, at initialisation,
without any step (Section E.3). The experiments ``figure2.py`` and ``layernorm.py`` choose the masks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ..training import fashion_mnist
from ..training.errors import TrainingError
from .experiment import Row

HIDDEN = 64
BATCHES = 100
BATCH_SIZE = 64
SPARSITIES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
SEEDS = range(10)

Norm = Literal["batch", "layer", "none"]

# By (images, mean, standard deviation) of the training pixels, in [0, 1]. The paper normalises by MNIST's.
_KNOWN = {(60_000, 0.1307, 0.3081): "MNIST", (60_000, 0.2860, 0.3530): "Fashion-MNIST"}


class Images(NamedTuple):
    """The training images of a data set, as they are in its files."""

    name: str
    """The data set, recognised by the number of images and their mean and standard deviation."""
    pixels: Tensor
    """uint8, ``(N, height * width)``."""
    labels: Tensor
    """uint8, ``(N,)``."""
    mean: float
    """The mean of all pixels, in [0, 255]."""
    std: float
    """The standard deviation of all pixels, in [0, 255]."""


class Gradients(NamedTuple):
    """Sums of |gradient| over the active weights of each neuron and all batches: ``(masks, HIDDEN)``."""

    sparse: Tensor
    dense: Tensor

    def ratio(self, mask: int, neurons: slice = slice(None)) -> float:
        """Return mean |gradient| with a mask divided by that without, over the mask's active weights."""
        return float(self.sparse[mask, neurons].sum() / self.dense[mask, neurons].sum())


@lru_cache(maxsize=1)
def load_images(data_dir: str | None) -> Images:
    """Return the training images of Fashion-MNIST or MNIST.

    Args:
        data_dir: a folder with the four files of either, whose names and format are the same; None:
            Fashion-MNIST, as :mod:`..training.fashion_mnist` finds it.

    Raises:
        TrainingError: the data are not found, damaged, or too few.
    """
    images, labels, _, _ = fashion_mnist.load(Path(data_dir) if data_dir else None)
    if len(images) < BATCHES * BATCH_SIZE:
        raise TrainingError(
            f"the data set has {len(images)} training images, "
            f"{BATCHES} batches of {BATCH_SIZE} need {BATCHES * BATCH_SIZE}"
        )
    std, mean = (float(value) for value in torch.std_mean(images.double(), correction=0))
    shown = (len(images), round(mean / 255, 4), round(std / 255, 4))
    unknown = "unknown data ({} images, mean {:.4f}, std {:.4f})".format(*shown)
    name = _KNOWN.get(shown, unknown)
    return Images(name=name, pixels=images.flatten(1), labels=labels, mean=mean, std=std)


def measure_gradients(norm: Norm, masks: Sequence[Tensor], images: Images, seed: int) -> Gradients:
    """Return the gradients of the first layer of a two-layer network with and without masks.

    The network is a linear layer, the norm (gamma 1, beta 0), ReLU and a linear classifier, with the weights
    of a seed. A mask zeroes weights and leaves the others as they are. Each network sees the same batches.

    Args:
        norm: the norm after the first layer.
        masks: boolean, ``(HIDDEN, pixels)``; no neuron is empty.
        images: see :func:`load_images`.
        seed: of the weights and the order of the images.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = images.pixels.shape[1]
    weight = torch.randn(HIDDEN, inputs, generator=generator) / math.sqrt(inputs)
    classifier = torch.randn(10, HIDDEN, generator=generator) / math.sqrt(HIDDEN)
    order = torch.randperm(len(images.labels), generator=generator)
    sparse = torch.zeros(len(masks), HIDDEN, dtype=torch.float64)
    dense = torch.zeros_like(sparse)
    for batch in torch.split(order[: BATCHES * BATCH_SIZE], BATCH_SIZE):
        pixels = (images.pixels[batch].float() - images.mean) / images.std
        labels = images.labels[batch].long()
        whole = _gradient(weight, classifier, norm, pixels, labels).abs()
        for i, mask in enumerate(masks):
            masked = _gradient(weight * mask, classifier, norm, pixels, labels).abs()
            sparse[i] += (masked * mask).sum(dim=1)
            dense[i] += (whole * mask).sum(dim=1)
    return Gradients(sparse, dense)


def data_of(rows: Sequence[Row]) -> str:
    """Return the name of the data set, which is the same in all rows."""
    return str(rows[0]["data"]) if rows else "none"


def theory(sparsity: float) -> float:
    """Return the ratio of Equation 11 for a neuron of this sparsity, in [0, 1)."""
    return 1.0 / math.sqrt(1.0 - sparsity)


def _gradient(weight: Tensor, classifier: Tensor, norm: Norm, pixels: Tensor, labels: Tensor) -> Tensor:
    """Return the gradient of the mean cross entropy by the first layer's weight, masked entries included."""
    weight = weight.detach().requires_grad_()
    x = F.linear(pixels, weight)
    if norm == "batch":
        x = F.batch_norm(x, None, None, training=True)
    elif norm == "layer":
        x = F.layer_norm(x, (HIDDEN,))
    loss = F.cross_entropy(F.linear(F.relu(x), classifier), labels)
    (gradient,) = torch.autograd.grad(loss, weight)
    return gradient
