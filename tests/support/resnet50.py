"""The weights of ResNet-50 (He et al. 2016)."""

from __future__ import annotations


def resnet50_shapes() -> dict[str, tuple[int, ...]]:
    """The 53 convolutions and the classifier of ResNet-50, under torchvision's names."""
    shapes: dict[str, tuple[int, ...]] = {"conv1": (64, 3, 7, 7)}
    channels = 64
    for stage, (blocks, width) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)], start=1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            shapes[f"{name}.conv1"] = (width, channels, 1, 1)
            shapes[f"{name}.conv2"] = (width, width, 3, 3)
            shapes[f"{name}.conv3"] = (4 * width, width, 1, 1)
            if block == 0:
                shapes[f"{name}.downsample"] = (4 * width, channels, 1, 1)
            channels = 4 * width
    shapes["fc"] = (1000, channels)
    return shapes
