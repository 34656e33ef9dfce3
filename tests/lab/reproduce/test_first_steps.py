"""Rows name the commit of their code, and committed results are those of today's code."""

import json
import math
import subprocess
from pathlib import Path

import pytest
import torch
from fake_experiment import Fake

from sparseopt_kernels import native_library
from sparseopt_kernels.__main__ import main
from sparseopt_kernels.lab.machine import machine
from sparseopt_kernels.lab.reproduce import results as results_module
from sparseopt_kernels.lab.reproduce.catalogue import EXPERIMENTS
from sparseopt_kernels.lab.reproduce.code_commit import commit_of
from sparseopt_kernels.lab.reproduce.experiment import Settings, Trained
from sparseopt_kernels.lab.reproduce.first_steps import STEPS, first_losses, first_steps_path, repeats
from sparseopt_kernels.lab.reproduce.results import Results
from sparseopt_kernels.lab.reproduce.searched import images
from sparseopt_kernels.lab.training.config import Config
from sparseopt_kernels.lab.training.errors import TrainingError
from sparseopt_kernels.lab.training.run import Run
from sparseopt_kernels.topology.dynamic_sparse_training import DynamicSparseTraining

RESULTS = Path(__file__).parents[3] / "docs" / "results"
COMMITTED = sorted(RESULTS.glob("*-first-steps.json"))


def losses_in(dtype, number=0, steps=STEPS):
    numerator = {torch.float32: 1.0, torch.float64: 2.0}[dtype]
    return [number + numerator / (step + 1) for step in range(steps)]


class Trains(Fake):
    """The fake experiment with losses that can be made again."""

    def kept_case(self):
        return self.cases([])[0]

    def first_losses(self, case, settings, steps):
        assert torch.get_num_threads() == 1
        return losses_in(torch.get_default_dtype(), case["number"], steps)


class TrainsOtherwise(Trains):
    def first_losses(self, case, settings, steps):
        return [loss + 0.01 for loss in super().first_losses(case, settings, steps)]


def committed(path):
    """Return the experiment and its kept losses; skip the test where its data are missing."""
    experiment = EXPERIMENTS[path.stem.removesuffix("-first-steps")]
    assert isinstance(experiment, Trained)
    try:
        experiment.check(Settings())
    except TrainingError as error:
        pytest.skip(str(error))
    return experiment, json.loads(path.read_text())


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore")
def test_committed_results_are_of_todays_code(path):
    """If it fails, the code trains otherwise than when the rows were made: measure them again."""
    experiment, kept = committed(path)
    assert repeats(experiment, Settings(), kept)


def test_all_results_name_their_code_and_those_that_train_have_first_steps():
    for path in RESULTS.glob("*.csv"):
        if path.stem in EXPERIMENTS:
            assert path.read_text().splitlines()[0].endswith(",commit"), path
            assert (first_steps_path(path) in COMMITTED) == isinstance(EXPERIMENTS[path.stem], Trained), path


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore")
def test_another_machine_repeats_them_and_sees_masks_that_are_not_updated(path, monkeypatch):
    experiment, kept = committed(path)
    kept["machine"] = "another"
    assert repeats(experiment, Settings(), kept)
    monkeypatch.setattr(DynamicSparseTraining, "_count_step", lambda self: None)
    assert not repeats(experiment, Settings(), kept)


def test_the_case_that_is_kept_tells_much():
    kept = {name: e.kept_case() for name, e in EXPERIMENTS.items() if isinstance(e, Trained)}
    assert (kept["small"]["method"], kept["small"]["remedy"], kept["small"]["optimizer"]) == (
        *("rigl", "both", "eq12"),
    )
    assert (kept["resnet20"]["remedy"], kept["resnet20"]["optimizer"]) == ("clip", "eq12")
    assert (kept["prediction"]["update_every"], kept["prediction"]["optimizer"]) == (25, "eq12")
    assert (kept["appendixF"]["clip"], kept["appendixF"]["factor"]) == ("dense", "layer")
    assert (kept["skew"]["method"], kept["skew"]["optimizer"]) == ("rigl", "sparseopt")
    for name in ("figure5", "figure10"):
        assert (kept[name]["optimizer"], kept[name]["regrow"]) == ("sparseopt", "corrected")


@pytest.mark.parametrize("changed", ["losses", "losses_in_float64"])
@pytest.mark.parametrize("same", [True, False], ids=["the same processor", "another"])
@pytest.mark.parametrize(("off", "is_close"), [(0.0, True), (1e-9, True), (1e-5, False), (math.nan, False)])
def test_what_repeats(tmp_path, changed, same, off, is_close):
    experiment = Trains(tmp_path / "trace")
    kept = {"case": experiment.kept_case(), "torch": torch.__version__}
    kept |= {"losses": losses_in(torch.float32), "losses_in_float64": losses_in(torch.float64)}
    kept["machine"] = machine() if same else "another"
    kept[changed][3] += off
    compared = "losses" if same and native_library.MISSING is None else "losses_in_float64"
    expected = changed != compared or (off == 0.0 if compared == "losses" else is_close)
    assert repeats(experiment, Settings(), kept) == expected


def test_code_that_trains_otherwise_adds_no_rows(tmp_path, monkeypatch, capsys):
    command = ["reproduce", "fake", "--output", str(tmp_path), "--workers", "1", "--quiet"]
    monkeypatch.setitem(EXPERIMENTS, "fake", Trains(tmp_path / "trace"))
    assert main(command) == 0
    before = (tmp_path / "fake.csv").read_bytes()
    monkeypatch.setitem(EXPERIMENTS, "fake", TrainsOtherwise(tmp_path / "trace", count=5))
    assert main(command) == 2
    assert "this code trains otherwise: name another folder" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "fake.csv").read_bytes() == before


def test_the_experiments_that_train_networks():
    trained = {name for name, experiment in EXPERIMENTS.items() if isinstance(experiment, Trained)}
    assert trained == {"figure5", "figure10", "small", "appendixF", "resnet20", "prediction", "skew"}


def test_the_command_keeps_the_first_steps_and_the_commit(tmp_path, monkeypatch):
    experiment = Trains(tmp_path / "trace")
    monkeypatch.setitem(EXPERIMENTS, "fake", experiment)
    monkeypatch.setattr(results_module, "code_commit", lambda: "abc1234+")
    assert main(["reproduce", "fake", "--output", str(tmp_path), "--workers", "1", "--quiet"]) == 0
    kept = json.loads((tmp_path / "fake-first-steps.json").read_text())
    assert kept["case"] == {"number": 0, "rate": 0.1}
    assert kept["losses"] == losses_in(torch.float32)
    assert kept["losses_in_float64"] == losses_in(torch.float64)
    assert (kept["machine"], kept["torch"]) == (machine(), torch.__version__)
    rows = Results(experiment, tmp_path / "fake.csv").rows()
    assert {row["commit"] for row in rows} == {"abc1234+"}
    # Rows that are there keep the commit that made them.
    monkeypatch.setattr(results_module, "code_commit", lambda: "def5678")
    more = Trains(tmp_path / "trace", count=5)
    monkeypatch.setitem(EXPERIMENTS, "fake", more)
    assert main(["reproduce", "fake", "--output", str(tmp_path), "--workers", "1", "--quiet"]) == 0
    rows = Results(more, tmp_path / "fake.csv").rows()
    assert [row["commit"] for row in rows] == ["abc1234+"] * 8 + ["def5678"] * 2


def test_rows_whose_first_steps_are_gone_get_no_more(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(EXPERIMENTS, "fake", Trains(tmp_path / "trace"))
    command = ["reproduce", "fake", "--output", str(tmp_path), "--workers", "1", "--quiet"]
    assert main(command) == 0
    (tmp_path / "fake-first-steps.json").unlink()
    assert main(command) == 0  # all rows are there
    assert not (tmp_path / "fake-first-steps.json").exists()
    before = (tmp_path / "fake.csv").read_bytes()
    monkeypatch.setitem(EXPERIMENTS, "fake", Trains(tmp_path / "trace", count=5))
    assert main(command) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "has rows, and fake-first-steps.json" in said
    assert (tmp_path / "fake.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"case": {"num', "cannot be read (Unterminated string"),
        ("[1.0]", "cannot be read ("),
        ('{"case": {}, "losses": [], "losses_in_float64": [], "torch": ""}', "has no commit, machine: bring"),
    ],
)
def test_rows_whose_first_steps_are_damaged_get_no_more(tmp_path, monkeypatch, capsys, content, said):
    monkeypatch.setitem(EXPERIMENTS, "fake", Trains(tmp_path / "trace"))
    command = ["reproduce", "fake", "--output", str(tmp_path), "--workers", "1", "--quiet"]
    assert main(command) == 0
    before = (tmp_path / "fake.csv").read_bytes()
    (tmp_path / "fake-first-steps.json").write_text(content)
    monkeypatch.setitem(EXPERIMENTS, "fake", Trains(tmp_path / "trace", count=5))
    assert main(command) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "fake.csv").read_bytes() == before


@pytest.mark.parametrize("kept", [0, 10, STEPS - 1])
def test_too_few_losses_are_repeated_by_nothing(tmp_path, kept):
    experiment = Trains(tmp_path / "trace")
    few = {"losses_in_float64": losses_in(torch.float64)[:kept], "losses": losses_in(torch.float32)}
    case = {"case": experiment.kept_case(), **few, "torch": "", "machine": "another"}
    assert not repeats(experiment, Settings(), case)


def test_a_file_of_before_is_refused(tmp_path):
    experiment = Fake(tmp_path / "trace")
    (tmp_path / "fake.csv").write_text(",".join(experiment.columns) + "\n")
    with pytest.raises(TrainingError, match=r"fake\.csv has no column commit: it was written before"):
        Results(experiment, tmp_path / "fake.csv")


def git(folder, *arguments):
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    done = subprocess.run(["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_commit_of_a_checkout(tmp_path):
    code, other = tmp_path / "code.py", tmp_path / "results.csv"
    code.write_text("a = 1\n")
    assert commit_of(code) == ""  # no checkout
    git(tmp_path, "init", "-q")
    assert commit_of(code) == ""  # in one, but not of it: an environment in a user's repository
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-qm", "a")
    commit = git(tmp_path, "rev-parse", "--short", "HEAD")
    assert commit_of(code) == commit
    other.write_text("a row\n")
    assert commit_of(code) == commit  # results are no code
    code.write_text("a = 2\n")
    assert commit_of(code) == f"{commit}+"
    git(tmp_path, "checkout", "-q", "code.py")
    (tmp_path / "new.py").write_text("")
    assert commit_of(code) == f"{commit}+"


def test_losses_are_those_of_the_batches_before_each_step(one_thread):
    config = Config(epochs=2, batch_size=64, warmup_epochs=1, update_every=4, threads=1, device="cpu")
    dataset = images("digits", None, 640, 200).dataset
    losses = first_losses(Run(config, dataset, "sgd", 0), 13)
    assert len(losses) == 13
    whole = Run(config, dataset, "sgd", 0)
    first = whole.train_epoch()
    assert first.train_loss == pytest.approx(sum(losses[:10]) / 10, rel=1e-6)  # an epoch has ten steps
    assert losses[10] != pytest.approx(losses[0], rel=1e-3)
    assert len(first_losses(Run(config, dataset, "sgd", 0), 50)) == 20  # all there are
