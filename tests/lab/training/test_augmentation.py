import torch

from sparseopt_kernels.lab.training.augmentation import CropAndFlip, random_crop
from sparseopt_kernels.lab.training.data import Dataset
from sparseopt_kernels.topology.seeding import generator

EXAMPLE = torch.arange(1.0, 5.0).view(1, 1, 2, 2)  # 1 2 / 3 4


def test_a_crop_and_a_flip_by_hand():
    augment = CropAndFlip(padding=1, fill=(-9.0,))

    def changed(*drawn):
        return augment(EXAMPLE, torch.tensor([drawn]))[0, 0].tolist()

    assert changed(1, 1, 0) == [[1, 2], [3, 4]]
    assert changed(1, 1, 1) == [[2, 1], [4, 3]]
    assert changed(0, 0, 0) == [[-9, -9], [-9, 1]]
    assert changed(2, 2, 0) == [[4, -9], [-9, -9]]
    assert changed(0, 2, 0) == [[-9, -9], [2, -9]]  # row, then column
    assert changed(0, 2, 1) == [[-9, -9], [-9, 2]]  # cropped, then flipped


def test_each_image_and_channel_has_its_own():
    augment = CropAndFlip(padding=1, fill=(-1.0, -2.0))
    images = torch.randn(3, 2, 5, 4)
    drawn = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 0]])
    out = augment(images, drawn)
    assert torch.equal(out[0], images[0])
    assert torch.equal(out[1], images[1].flip(2))
    assert torch.equal(out[2, :, 1:], images[2, :, :-1])
    assert out[2, :, 0].tolist() == [[-1.0] * 4, [-2.0] * 4]


def test_draws_cover_all_places_and_flip_half():
    drawn = CropAndFlip(padding=4, fill=(0.0,)).draw(4000, seed=1, epoch=2)
    for column in (0, 1):
        counts = drawn[:, column].bincount(minlength=9)
        assert len(counts) == 9
        assert (counts / 4000 - 1 / 9).abs().max() < 0.03
    assert abs(drawn[:, 2].float().mean() - 0.5) < 0.04


def test_an_example_is_changed_alike_in_any_batch_and_anew_in_each_epoch():
    images, labels = torch.randn(40, 1, 8, 8), torch.arange(40) % 4
    data = Dataset(images, labels, images, labels, CropAndFlip(padding=2, fill=(0.0,)))

    def augmented(batches, seed=0, epoch=0):
        return torch.cat([i for i, _ in data.train_batches([torch.tensor(b) for b in batches], seed, epoch)])

    every = augmented([list(range(40))])
    assert torch.equal(augmented([[7, 3], [30]]), every[[7, 3, 30]])
    assert not torch.equal(augmented([list(range(40))], epoch=1), every)
    assert not torch.equal(augmented([list(range(40))], seed=1), every)
    [(tested, _)] = data.test_batches(0, 1)
    assert torch.equal(tested, images)


def test_a_random_part_of_a_picture_is_inside_and_within_the_limits():
    draws = generator(0, 0, 0)
    areas = []
    for _ in range(300):
        left, upper, right, lower = random_crop(500, 375, draws)
        assert 0 <= left < right <= 500
        assert 0 <= upper < lower <= 375
        width, height = right - left, lower - upper
        areas.append(width * height / (500 * 375))
        assert 0.99 * 3 / 4 <= width / height <= 1.01 * 4 / 3
    assert 0.075 < min(areas) < 0.15
    assert max(areas) > 0.9


def test_a_picture_that_no_part_fits_gives_its_middle():
    assert random_crop(1000, 10, generator(0, 0, 0)) == (493, 0, 506, 10)
