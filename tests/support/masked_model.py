"""A model with a layer of each kind, and its masks by name."""

import torch
from torch import nn


def make_model():
    """Two convolutions, a transposed one in groups and a classifier, with normalisation between."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 12, 3, groups=2))
    return nn.ModuleDict(
        {"body": body, "up": nn.ConvTranspose2d(12, 6, 3, groups=3), "fc": nn.Linear(20, 10)}
    )


NAMES = ["body.0.weight", "body.3.weight", "up.weight", "fc.weight"]


def masks_of(model):
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith("_mask")}


def assert_same(left, right):
    assert list(left) == list(right)
    for name in left:
        assert torch.equal(left[name], right[name]), name
