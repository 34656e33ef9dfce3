"""The measurement of figure2 and layernorm: the data it is made on, and results that were committed."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

from sparseopt_kernels.lab.reproduce.catalogue import EXPERIMENTS
from sparseopt_kernels.lab.reproduce.experiment import Settings
from sparseopt_kernels.lab.reproduce.gradient_ratio import BATCH_SIZE, BATCHES, HIDDEN, load_images
from sparseopt_kernels.lab.reproduce.results import Results
from sparseopt_kernels.lab.training.errors import TrainingError

RESULTS = Path(__file__).parents[3] / "docs" / "results"


def write_data(folder: Path, count: int) -> str:
    """The four files, of random images of 4 x 4 pixels."""
    generator = torch.Generator().manual_seed(0)
    for part, images in (("train", count), ("t10k", 10)):
        pixels = torch.randint(256, (images * 16,), generator=generator, dtype=torch.uint8)
        labels = torch.arange(images, dtype=torch.uint8) % 10
        for name, shape, values in (
            ("images-idx3", (images, 4, 4), pixels),
            ("labels-idx1", (images,), labels),
        ):
            header = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
            (folder / f"{part}-{name}-ubyte").write_bytes(header + values.numpy().tobytes())
    return str(folder)


@pytest.mark.parametrize("name", ["figure2", "layernorm"])
def test_a_case_on_data_of_ones_own(tmp_path: Path, name: str) -> None:
    settings = Settings(write_data(tmp_path, BATCHES * BATCH_SIZE))
    experiment = EXPERIMENTS[name]
    experiment.check(settings)
    case = experiment.cases([])[0]
    rows = experiment.measure(case, settings)
    assert experiment.measure(case, settings) == rows  # nothing random is left
    results = Results(experiment, tmp_path / "results.csv")
    results.add(case, rows)
    assert rows[0]["sparsity"] == 0.0
    assert rows[0]["ratio"] == 1.0  # the same network
    assert {row["data"] for row in rows} == {load_images(str(tmp_path)).name}
    assert rows[0]["data"].startswith("unknown data (6400 images, mean 0.5")


def test_too_few_images(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="6399 training images, 100 batches of 64 need 6400"):
        load_images(write_data(tmp_path, BATCHES * BATCH_SIZE - 1))


def test_the_random_state_of_the_caller_is_not_touched(tmp_path: Path) -> None:
    settings = Settings(write_data(tmp_path, BATCHES * BATCH_SIZE))
    before = torch.get_rng_state()
    experiment = EXPERIMENTS["layernorm"]
    experiment.measure(experiment.cases([])[-1], settings)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["figure2", "layernorm"])
def test_committed_results_are_complete_and_of_fashion_mnist(name: str) -> None:
    results = Results(EXPERIMENTS[name], RESULTS / f"{name}.csv")
    assert results.missing() == []
    assert {row["data"] for row in results.rows()} == {"Fashion-MNIST"}
    assert (RESULTS / f"{name}.png").is_file()
    table = EXPERIMENTS[name].table(results.rows())
    assert any("Fashion-MNIST" in line for line in table)


def test_neurons_of_the_mixed_layer_share_it_evenly() -> None:
    from sparseopt_kernels.lab.reproduce import layernorm

    assert HIDDEN % len(layernorm._MIXED) == 0
