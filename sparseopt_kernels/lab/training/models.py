"""The networks of the command line and the benchmarks. All have batch normalisation, whose effect on sparse
layers SparseOpt corrects. Nothing here knows of masks.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .layers import GlobalMean
from .resnet50 import resnet50

MODELS = ("mlp", "convnet", "resnet8", "resnet20", "resnet50")


def build_model(name: str, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Return the model ``name`` of :data:`MODELS` for images of shape ``(channels, height, width)``."""
    channels, height, width = image_shape
    if name == "mlp":
        return mlp(channels * height * width, num_classes)
    if name == "convnet":
        return convnet(channels, num_classes)
    if name == "resnet8":
        return resnet(channels, num_classes, blocks=1)
    if name == "resnet20":
        return resnet(channels, num_classes, blocks=3)
    if name == "resnet50":
        return resnet50(channels, num_classes)
    raise ValueError(f"model is {name!r}, it must be one of {', '.join(map(repr, MODELS))}")


def mlp(in_features: int, num_classes: int, hidden: tuple[int, ...] = (512, 256, 128)) -> nn.Sequential:
    """Return an MLP: linear, batch norm and ReLU for each width in ``hidden``, then a linear classifier.

    It takes ``(N, ...)`` with ``in_features`` elements per example.
    """
    layers: dict[str, nn.Module] = {"flatten": nn.Flatten()}
    for i, (fan_in, width) in enumerate(pairwise((in_features, *hidden)), start=1):
        layers |= {f"fc{i}": nn.Linear(fan_in, width, bias=False), f"bn{i}": nn.BatchNorm1d(width)}
        layers[f"relu{i}"] = nn.ReLU()
    layers["classifier"] = nn.Linear(hidden[-1], num_classes)
    return nn.Sequential(OrderedDict(layers))


def convnet(in_channels: int, num_classes: int, widths: tuple[int, ...] = (32, 64, 128)) -> nn.Sequential:
    """Return a convolutional network: 3x3 convolution, batch norm and ReLU for each width, all but the first
    with stride 2; then the mean over the image and a linear classifier.

    It takes ``(N, in_channels, H, W)`` of any size.
    """
    layers: dict[str, nn.Module] = {}
    for i, (fan_in, width) in enumerate(pairwise((in_channels, *widths)), start=1):
        layers[f"conv{i}"] = _conv3x3(fan_in, width, stride=1 if i == 1 else 2)
        layers |= {f"bn{i}": nn.BatchNorm2d(width), f"relu{i}": nn.ReLU()}
    layers |= {"mean": GlobalMean(), "classifier": nn.Linear(widths[-1], num_classes)}
    return nn.Sequential(OrderedDict(layers))


def resnet(in_channels: int, num_classes: int, blocks: int) -> nn.Sequential:
    """Return the ResNet of He et al. (2016) for small images, with their parameter-free shortcuts (option A).

    It has three stages of ``blocks`` blocks of two convolutions. ResNet-20 has three blocks a stage: 19
    convolutions, 19 batch norms and a classifier, 59 parameter tensors, 0.27 million parameters. ResNet-8
    has one. It takes ``(N, in_channels, H, W)`` of any size.
    """
    layers: dict[str, nn.Module] = {
        "conv": _conv3x3(in_channels, 16),
        "bn": nn.BatchNorm2d(16),
        "relu": nn.ReLU(),
    }
    for i, (fan_in, width, stride) in enumerate(((16, 16, 1), (16, 32, 2), (32, 64, 2)), start=1):
        rest = (_Block(width, width) for _ in range(blocks - 1))
        layers[f"stage{i}"] = nn.Sequential(_Block(fan_in, width, stride), *rest)
    layers |= {"mean": GlobalMean(), "classifier": nn.Linear(64, num_classes)}
    model = nn.Sequential(OrderedDict(layers))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return model


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut that subsamples and pads with zero channels."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.new_channels = channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        half = self.new_channels // 2
        shortcut = F.pad(shortcut, (0, 0, 0, 0, half, self.new_channels - half))
        return F.relu(out + shortcut)


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
