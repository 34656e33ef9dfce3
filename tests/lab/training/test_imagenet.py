import random

import pytest
import torch
from miniatures import CLASSES, make_imagenet
from PIL import Image

from sparseopt_kernels.lab.training.data import open_dataset
from sparseopt_kernels.lab.training.errors import TrainingError
from sparseopt_kernels.lab.training.imagenet import ImageNet

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_imagenet(tmp_path_factory.mktemp("imagenet"), train=3, val=2)


def batches(data, indices, seed=0, epoch=0):
    return list(data.train_batches([torch.tensor(i) for i in indices], seed, epoch))


def test_classes_are_folders_in_alphabetical_order(folder):
    data = open_dataset("imagenet", str(folder))
    assert (data.num_classes, data.train_size, data.test_size) == (2, 6, 4)
    assert data.image_shape == (3, 224, 224)
    [(images, labels)] = batches(data, [[5, 0, 3]])
    assert labels.tolist() == [1, 0, 1]
    assert images.shape == (3, 3, 224, 224)
    assert images.dtype == torch.float32


def test_what_is_drawn_depends_on_seed_epoch_and_example_alone(folder):
    data = ImageNet(folder, 0)
    [(images, _)] = batches(data, [[0, 1, 4]])
    [(first, _), (second, _)] = batches(data, [[4], [1, 0]])
    assert torch.equal(images[2], first[0])
    assert torch.equal(images[[1, 0]], second)
    for other in (batches(data, [[0]], seed=1), batches(data, [[0]], epoch=1)):
        assert not torch.equal(other[0][0][0], images[0])


@pytest.mark.slow
def test_processes_read_the_same_and_nobodys_random_state_is_touched(folder):
    torch.manual_seed(5)
    random.seed(5)
    states = torch.get_rng_state(), random.getstate()
    here = batches(ImageNet(folder, 0), [[0, 1], [2, 5]])
    there = batches(ImageNet(folder, 2), [[0, 1], [2, 5]])
    for (a, labels), (b, same_labels) in zip(here, there, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(labels, same_labels)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()


def test_a_test_picture_is_its_middle(tmp_path):
    make_imagenet(tmp_path, train=1, val=1)
    picture = Image.new("RGB", (768, 512), (255, 0, 0))
    picture.paste((0, 128, 255), (160, 32, 608, 480))  # the middle 448 x 448: at half the size, 224 x 224
    target = tmp_path / "val" / CLASSES[0]
    next(target.iterdir()).unlink()
    picture.save(target / "blue.png")
    [(images, labels)] = ImageNet(tmp_path, 0).test_batches(0, 1)
    assert labels.tolist() == [0, 1]
    inner = (images[0] * STD + MEAN)[:, 2:-2, 2:-2]  # scaling mixes the edges
    expected = torch.tensor([0, 128 / 255, 1.0]).view(3, 1, 1).expand_as(inner)
    torch.testing.assert_close(inner, expected, atol=1e-4, rtol=0)


def test_ranks_share_the_test_pictures(folder):
    data = ImageNet(folder, 0)
    [(every, _)] = data.test_batches(0, 1)
    [(first, _)], [(second, _)] = data.test_batches(0, 2), data.test_batches(1, 2)
    assert torch.equal(every[0::2], first)
    assert torch.equal(every[1::2], second)


def test_grey_pictures_have_three_channels(tmp_path):
    make_imagenet(tmp_path, train=1, val=1)
    path = next((tmp_path / "train" / CLASSES[0]).iterdir())
    Image.open(path).convert("L").save(path)
    [(images, _)] = batches(ImageNet(tmp_path, 0), [[0]])
    grey = images[0] * STD + MEAN
    assert torch.allclose(grey[0], grey[2], atol=1e-6)


def test_a_folder_has_to_be_named():
    with pytest.raises(TrainingError, match=r"name the folder that has train/CLASS/\*\.JPEG"):
        open_dataset("imagenet")


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(TrainingError, match=r"cannot read .*train \(No such file"):
        ImageNet(tmp_path, 0)
    make_imagenet(tmp_path, train=1, val=0)
    with pytest.raises(TrainingError, match=r"cannot read .*val \(No such file"):
        ImageNet(tmp_path, 0)


def test_a_class_without_pictures_is_named(tmp_path):
    make_imagenet(tmp_path, train=1, val=1)
    (tmp_path / "train" / "n03_empty").mkdir()
    (tmp_path / "train" / "n03_empty" / "notes.txt").write_text("")
    with pytest.raises(TrainingError, match=r"classes without pictures \(n03_empty; 1 of 3\)"):
        ImageNet(tmp_path, 0)


def test_a_class_that_training_has_not_is_named(tmp_path):
    make_imagenet(tmp_path, train=1, val=1)
    (tmp_path / "val" / CLASSES[0]).rename(tmp_path / "val" / "n09_other")
    with pytest.raises(TrainingError, match=r"classes that .*train has not: n09_other"):
        ImageNet(tmp_path, 0)


def test_fewer_than_two_classes(tmp_path):
    (tmp_path / "train" / "n01").mkdir(parents=True)
    with pytest.raises(TrainingError, match="1 folders of classes, it must have at least 2"):
        ImageNet(tmp_path, 0)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_picture_that_cannot_be_decoded_is_named(tmp_path, workers):
    make_imagenet(tmp_path, train=1, val=1)
    path = next((tmp_path / "train" / CLASSES[1]).iterdir())
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(TrainingError, match=rf"cannot decode .*{path.name}"):
        batches(ImageNet(tmp_path, workers), [[0, 1]])
