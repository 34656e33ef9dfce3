"""The command ``demo``: what it trains and times, what it writes, and that its words follow the numbers."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from sparseopt_kernels.__main__ import main
from sparseopt_kernels.lab.bench.contestants import Contestant, sgd
from sparseopt_kernels.lab.bench.network import Network
from sparseopt_kernels.lab.demo import cli, step_time
from sparseopt_kernels.lab.demo.conclusions import (
    accuracy_title,
    agreement,
    remedy_conclusions,
    remedy_worth,
    speed_conclusions,
    speed_title,
    times_table,
    without_remedies,
)
from sparseopt_kernels.lab.demo.step_time import (
    BY_HAND,
    CORRECTED,
    DENSE,
    PLAIN,
    TUNED,
    Size,
    StepTimes,
    measure,
)
from sparseopt_kernels.lab.timing import Rounds, Summary, speed
from sparseopt_kernels.lab.training.by_hand import MaskedSGD
from sparseopt_kernels.lab.training.config import OPTIMIZERS, Config, new_config
from sparseopt_kernels.lab.training.data import load_dataset
from sparseopt_kernels.lab.training.errors import TrainingError
from sparseopt_kernels.lab.training.paired import Paired
from sparseopt_kernels.lab.training.run import Row, Run

TINY = Size(hidden=(48, 32), sparsity=0.9, batch_size=32, rounds=Rounds(timed=4, warmup=1))


def tiny_config(**given: object) -> Config:
    options = {"epochs": 2, "batch_size": 300, "update_every": 3, "seeds": (0, 1, 2), "device": "cpu"}
    return new_config({"optimizer": OPTIMIZERS, **options, **given})


def took(ms: float, spread: float = 0.05) -> Summary:
    return Summary((1 - spread) * ms, ms, (1 + spread) * ms, ms, 10)


def fake_times(**ms: float) -> dict[str, Summary]:
    """Of all contestants, 10 ms if not given."""
    names = {"by_hand": BY_HAND, "tuned": TUNED, "dense": DENSE, "plain": PLAIN, "corrected": CORRECTED}
    return {name: took(ms.get(key, 10.0)) for key, name in names.items()}


def fake_measurement(**changes: object) -> StepTimes:
    measured = StepTimes(fake_times(by_hand=80.0), 8_540_000, 0.95, 2, 63, 1e-7, 0.5, 1.0)
    return dataclasses.replace(measured, **changes)  # type: ignore[arg-type]


def fake_rows(differences: list[float]) -> list[Row]:
    """The last rows of seeds whose accuracy with SparseOpt is that by hand plus a difference."""
    return [
        Row(name, seed, 2, 0.5, 0.95, 0.4, 0.9 + difference * (name == CORRECTED), 0.9, 0.1, 0.05, 1.0, "ok")
        for seed, difference in enumerate(differences)
        for name in OPTIMIZERS
    ]


class Finished(NamedTuple):
    output: Path
    printed: str


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A tiny demo."""
    output = tmp_path_factory.mktemp("demo") / "new" / "folder"
    printed = StringIO()
    with redirect_stdout(printed):
        assert cli.demonstrate(tiny_config(epochs=1), TINY, output, quiet=True) == 0
    return Finished(output, printed.getvalue())


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("own", "rival", "words"),
    [
        (10.0, 82.0, "8.2 times as fast as"),
        (82.0, 10.0, "slower (8.20 times as long) than"),
        (12.0, 10.0, "slower (1.20 times as long) than"),
        (10.0, 10.0, "within noise as fast as"),
        (10.5, 10.0, "within noise as fast as"),  # 9.975 to 11.025 and 9.5 to 10.5
        (10.0, 10.5, "within noise as fast as"),
    ],
)
def test_speed_is_worded_by_the_numbers(own: float, rival: float, words: str) -> None:
    assert speed(took(own), took(rival)) == words


def test_a_wide_spread_is_noise() -> None:
    assert speed(took(10.0), took(15.0, spread=0.01)) == "1.5 times as fast as"
    assert speed(took(10.0, spread=0.5), took(15.0)) == "within noise as fast as"


def test_each_sentence_is_on_its_own_rival() -> None:
    times = fake_times(by_hand=80.0, tuned=20.0, dense=5.0, corrected=30.0)
    by_hand, tuned, dense, correction, _ = speed_conclusions(fake_measurement(times=times))
    assert "8.0 times as fast as masked SGD by hand." in by_hand
    assert "2.0 times as fast as masked SGD by hand, tuned" in tuned
    assert "slower (2.00 times as long) than PyTorch's fused SGD" in dense
    assert "Eq. 12 it is slower (3.00 times as long) than without" in correction


@pytest.mark.parametrize(
    ("ms", "words"),
    [
        (80.0, "8.0 times as fast as by hand"),
        (5.0, "slower (2.00 times as long) than by hand"),
        (10.0, "within noise as fast as by hand"),
    ],
)
def test_the_title_says_what_is_seen(ms: float, words: str) -> None:
    measured = fake_measurement(times=fake_times(by_hand=ms))
    assert speed_title(measured) == f"SparseOpt's step is {words}"


def test_nothing_is_concluded_from_times_on_a_busy_machine() -> None:
    measured = fake_measurement(processor_share=0.4)
    assert "not reliable" in speed_title(measured)
    text = " ".join(speed_conclusions(measured))
    assert "a thread got 40% of a processor" in text
    assert "times as fast" not in text


def test_a_process_that_sleeps_has_no_share_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that has to wait for others: time passes, and its own time on the processor does not."""
    monkeypatch.setattr("time.thread_time", lambda: 1.0)
    assert not measure(load_dataset("digits"), TINY).is_reliable


def worth(differences: list[float], **given: object) -> dict[str, Paired]:
    """Of Eq. 12, and none of masked SGD, if accuracies without the remedies are 0.9."""
    config = without_remedies(tiny_config(**given))
    return remedy_worth(fake_rows(differences), fake_rows([0.0] * len(differences)), config, 10_000)


@pytest.mark.parametrize(
    ("differences", "title", "words"),
    [
        ([0.01, -0.01, 0.0], "no difference of accuracy beyond noise", "+0.00 points ± 2.48 (within"),
        ([-0.030, -0.031, -0.029], "Eq. 12 -3.0 points", "-3.00 points ± 0.25 (more than"),
        ([0.030, 0.031, 0.029], "Eq. 12 +3.0 points", "+3.00 points ± 0.25 (more than"),
    ],
)
def test_accuracy_is_worded_by_the_numbers(differences: list[float], title: str, words: str) -> None:
    assert accuracy_title(worth(differences)) == f"With clip and skipped step:\n{title}"
    config = without_remedies(tiny_config())
    rows, former = fake_rows(differences), fake_rows([0.0] * 3)
    plain, corrected = remedy_conclusions(rows, former, config, 10_000)
    assert plain.startswith("sgd: with both +0.00 points")
    assert corrected.startswith(f"sparseopt: with both {words} the noise")


def test_accuracy_of_two_seeds_is_not_judged() -> None:
    assert accuracy_title(worth([0.0, 0.0], seeds=(0, 1))) == "Test accuracy by epoch"


def test_what_the_remedies_are() -> None:
    config = tiny_config()
    assert (config.max_grad_norm, config.skip_step) == (1.0, True)
    without = without_remedies(config)
    assert (without.max_grad_norm, without.skip_step) == (None, False)
    assert dataclasses.replace(without, optimizer=OPTIMIZERS, max_grad_norm=1.0, skip_step=True) == config


def test_training_by_hand_is_that_of_sparseopt_to_the_last_bit_shown() -> None:
    """Over several updates of the masks, with the clip and with steps left out."""
    losses = []
    for name in ("by-hand", "sgd"):
        run = Run(tiny_config(epochs=12, lr=0.05), load_dataset("digits"), name, 0)
        losses.append([run.train_epoch().train_loss for _ in range(8)])
        assert run.topology is not None
        assert run.topology.exploration_rate() > 0.06
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_different_weights_are_called_different() -> None:
    assert "equal to rounding" in agreement(fake_measurement())
    assert "NOT equal" in agreement(fake_measurement(difference=1e-3))


def test_the_table_has_each_contestant_and_tells_who_does_not_mask() -> None:
    _, _, *lines = times_table(fake_measurement())
    assert len(lines) == 5
    assert [line.split()[-1] for line in lines] == ["yes", "yes", "no", "yes", "yes"]
    assert lines[0].startswith("by hand ")
    assert " 80 ms " in lines[0]
    assert " 8.00 " in lines[0]


def test_steps_by_hand_are_those_of_sparseopt_without_correction() -> None:
    measured = measure(load_dataset("digits"), TINY)
    assert measured.steps == 5
    assert measured.moved > 1e-3
    assert measured.difference <= 1e-5 * measured.moved
    assert measured.weights == 64 * 48 + 48 * 32 + 32 * 10
    assert measured.sparsity == pytest.approx(0.9, abs=1e-3)
    assert list(measured.times) == [BY_HAND, TUNED, DENSE, PLAIN, CORRECTED]
    assert all(0 < t.p20_ms <= t.p50_ms <= t.p80_ms and t.rounds == 4 for t in measured.times.values())


def unmasked(network: Network) -> Contestant:
    """Dense SGD that pretends to be masked."""
    return dataclasses.replace(sgd(network), work="masked sgd")


def test_a_wrong_step_by_hand_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(step_time._MAKERS, BY_HAND, (unmasked,))
    with pytest.raises(TrainingError, match="by-hand has wrong results"):
        measure(load_dataset("digits"), TINY)


@pytest.mark.parametrize("name", [TUNED, DENSE])
def test_another_stands_in_for_a_fused_sgd_that_is_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    makers = step_time._MAKERS[name]

    def idle(network: Network) -> Contestant:
        """Writes nothing."""
        return dataclasses.replace(makers[0](network), step=lambda: None)

    monkeypatch.setitem(step_time._MAKERS, name, (idle, *makers[1:]))
    measured = measure(load_dataset("digits"), TINY)
    assert len(measured.wrong) == 1
    assert list(measured.times) == [BY_HAND, TUNED, DENSE, PLAIN, CORRECTED]
    *lines, last = times_table(measured)
    assert last == f"{measured.wrong[0]}: wrong results, not timed"
    assert any("foreach" in line for line in lines)


def test_masks_by_hand_are_those_of_the_model_when_rigl_changes_them() -> None:
    run = Run(tiny_config(), load_dataset("digits"), "by-hand", 0)
    before = {name: run.masks[p].clone() for name, p in run.masks.named().items()}
    run.train_epoch()
    assert isinstance(run.optimizer, MaskedSGD)
    assert any(not torch.equal(run.masks[p], before[name]) for name, p in run.masks.named().items())
    assert not any(p[~run.masks[p]].any() for p in run.masks.named().values())


@pytest.mark.parametrize(("name", "value"), [("ham_alpha", 1.0), ("max_grad_norm_over", "dense")])
def test_what_plain_pytorch_does_not_do_is_refused(name: str, value: object) -> None:
    with pytest.raises(TrainingError, match="--optimizer by-hand"):
        tiny_config(**{name: value})


def test_files_and_their_content(finished: Finished) -> None:
    expected = ["config.json", "demo.png", "results.csv", "step_times.csv", "weights", "without"]
    assert sorted(os.listdir(finished.output)) == expected
    assert sorted(os.listdir(finished.output / "without")) == ["config.json", "results.csv", "weights"]
    without = json.loads((finished.output / "without" / "config.json").read_text())["options"]
    assert (without["max_grad_norm"], without["skip_step"]) == (None, False)
    assert (finished.output / "demo.png").read_bytes().startswith(b"\x89PNG")
    results = read(finished.output / "results.csv")
    assert {(row["optimizer"], row["seed"]) for row in results} == {
        (optimizer, seed) for optimizer in OPTIMIZERS for seed in "012"
    }
    contestants = [row["contestant"] for row in read(finished.output / "step_times.csv")]
    assert contestants == [BY_HAND, TUNED, DENSE, PLAIN, CORRECTED]


def test_what_is_printed(finished: Finished) -> None:
    for words in (
        "sgd - by-hand:",
        "sgd: with both",
        "sparseopt: with both",
        "fused SGD, no mask",
        "equal to rounding",
    ):
        assert words in finished.printed
    *results, picture, _, _ = finished.printed.splitlines()
    assert picture == f"picture: {finished.output / 'demo.png'}"
    assert max(map(len, results)) <= 120


def test_the_default_folder_is_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    config = tiny_config(epochs=1, seeds=(0,))
    assert cli.demonstrate(config, TINY, None, quiet=True) == 0
    assert os.listdir("runs/demo") == []
    assert "demo.png" in os.listdir("runs/demo-2")


def test_results_of_somebody_else_are_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.csv").write_text("years of work")
    assert main(["demo", "--output", str(tmp_path)]) == 2
    assert "has the results of another experiment (results.csv)" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["results.csv"]


def test_an_output_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["demo", "--output", str(tmp_path / "file")]) == 2
    assert "cannot make the output folder" in capsys.readouterr().err


def test_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object, **__: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "demonstrate", interrupted)
    assert main(["demo", "--output", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "sparseopt demo: stopped\n"
