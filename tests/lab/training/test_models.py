import pytest
import torch
from torch import nn

from sparseopt_kernels.lab.training.models import MODELS, build_model, resnet


def test_resnet20_is_the_classic_one():
    model = resnet(3, 10, blocks=3)
    assert len(list(model.parameters())) == 59
    assert sum(p.numel() for p in model.parameters()) == 269_722
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == 19
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 19


def test_resnet50_is_the_classic_one():
    model = build_model("resnet50", (3, 224, 224), 1000)
    assert len(list(model.parameters())) == 161
    assert sum(p.numel() for p in model.parameters()) == 25_557_032
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == 53
    strides = [m.stride[0] for m in model.stage2[0].modules() if isinstance(m, nn.Conv2d)]  # type: ignore[index, union-attr]
    assert strides == [1, 2, 1, 2]  # v1.5: in the 3x3 convolution, and in the shortcut


@pytest.mark.parametrize("image_shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 7, 5)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_model_takes_images_and_gives_scores(name, image_shape):
    model = build_model(name, image_shape, 7)
    scores = model(torch.randn(2, *image_shape))
    assert scores.shape == (2, 7)
    scores.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_shortcut_subsamples_and_pads_with_zeros():
    block = resnet(1, 10, blocks=3).stage2[0].eval()  # type: ignore[index, union-attr]
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(1, 16, 4, 4)
    out = block(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_unknown_model_is_named():
    with pytest.raises(ValueError, match=r"'vgg'.*'mlp'"):
        build_model("vgg", (1, 8, 8), 10)
