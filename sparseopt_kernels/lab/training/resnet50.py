"""The network of the paper's ImageNet experiments. Nothing here knows of masks."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .layers import GlobalMean

_BLOCKS = (3, 4, 6, 3)
_EXPANSION = 4  # a block's output channels, as a multiple of its width


def resnet50(in_channels: int, num_classes: int) -> nn.Sequential:
    """Return ResNet-50 of He et al. (2016), with the stride in a block's 3x3 convolution ("v1.5").

    It has 53 convolutions, 53 batch norms and a classifier, 161 parameter tensors, and 25.6 million
    parameters with 3 channels and 1000 classes. It takes ``(N, in_channels, H, W)`` and is made for 224x224.
    """
    layers: dict[str, nn.Module] = {
        "conv": nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False),
        "bn": nn.BatchNorm2d(64),
        "relu": nn.ReLU(),
        "pool": nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
    }
    channels = 64
    for stage, count in enumerate(_BLOCKS):
        width = 64 << stage
        blocks = []
        for block in range(count):
            blocks.append(_Bottleneck(channels, width, stride=2 if stage and not block else 1))
            channels = width * _EXPANSION
        layers[f"stage{stage + 1}"] = nn.Sequential(*blocks)
    layers |= {"mean": GlobalMean(), "classifier": nn.Linear(channels, num_classes)}
    model = nn.Sequential(OrderedDict(layers))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


class _Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, and a shortcut with a 1x1 convolution where the shape changes."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        channels = width * _EXPANSION
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, channels, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            convolution = nn.Conv2d(in_channels, channels, kernel_size=1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(OrderedDict(conv=convolution, bn=nn.BatchNorm2d(channels)))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))
