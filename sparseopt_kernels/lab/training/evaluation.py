"""The loss and the accuracy of a model on examples that it does not train on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from . import distributed

_BATCH = 1000


def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the mean cross entropy and the accuracy in [0, 1]. The model's mode does not change."""
    batches = zip(torch.split(images, _BATCH), torch.split(labels, _BATCH), strict=True)
    loss_sum, correct = sums_over(model, batches).tolist()
    return loss_sum / len(labels), correct / len(labels)


@torch.no_grad()
def sums_over(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the sum of the cross entropies and the number of correct predictions, ``(2,)`` float64."""
    mode = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    for images, labels in batches:
        scores = model(images).double()
        losses = F.cross_entropy(scores, labels, reduction="sum")
        sums = sums.to(losses.device) + torch.stack([losses, (scores.argmax(dim=1) == labels).sum()])
    model.train(mode)
    return sums


def as_many_on_all_ranks(
    batches: Iterator[tuple[Tensor, Tensor]], image_shape: tuple[int, int, int], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches, then empty ones until all ranks are through.

    All ranks must take part in each forward pass of a model whose parameters are sharded.
    """
    images = torch.empty(0, *image_shape, device=device)
    nothing = images, torch.empty(0, dtype=torch.int64, device=device)
    while True:
        batch = next(batches, None)
        some_have_one = distributed.sum_over_ranks(torch.tensor(int(batch is not None), device=device))
        if not int(some_have_one):
            return
        yield nothing if batch is None else batch
