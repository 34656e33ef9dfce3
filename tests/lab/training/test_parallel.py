"""``train`` under torchrun: DistributedDataParallel and sharded parameters, with gloo on a CPU."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from old_pytorch import needs_fsdp2
from ranks import is_aborted, on_ranks, started
from train_command import TINY, process_of_rank, rows, train, wait_until

from sparseopt_kernels.lab.training import distributed
from sparseopt_kernels.lab.training.errors import TrainingError
from sparseopt_kernels.lab.training.models import mlp

ONE_RUN = (*TINY[: TINY.index("--seeds")], "--seeds", "0", "--threads", "1", "--warmup-epochs", "1")
ONE_RUN += ("--device", "cpu", "--optimizer", "sparseopt", "--lr", "0.05")


def torchrun(folder: Path, ranks: int, *options: object) -> subprocess.Popen[str]:
    """``train`` on several ranks, in processes of their own."""
    return started(["-m", "sparseopt_kernels", "train", *options], folder, ranks)


def run(folder: Path, ranks: int, *options: object) -> tuple[int, str, str]:
    """Run ``train`` on several ranks, and return its exit code and what it printed."""
    for _ in range(3):
        code, out, err = finished(torchrun(folder, ranks, *options))
        if not is_aborted(err):
            break
        if "--resume" not in options:
            shutil.rmtree(folder / "out", ignore_errors=True)
    return code, out, err


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def weights(output: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(output / "weights" / "sparseopt-seed0.pt", weights_only=True)
    return state


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks have trained with sharded parameters."""
    folder = tmp_path_factory.mktemp("fsdp")
    code, out, err = run(folder, 2, *ONE_RUN, "--parallel", "fsdp", "--output", "out")
    assert code == 0, err
    assert out.count("picture: out/curves.png") == 1  # rank 0 alone prints
    assert err.count("[1/1] sparseopt seed 0") == 1
    return folder / "out"


@needs_fsdp2
@pytest.mark.slow
def test_sharded_parameters_give_what_whole_ones_do(output: Path, tmp_path: Path) -> None:
    code, _, err = run(tmp_path, 2, *ONE_RUN, "--output", "out", "--quiet")
    assert code == 0, err
    options = {p: json.loads((p / "config.json").read_text()) for p in (output, tmp_path / "out")}
    assert [(o["options"]["parallel"], o["ranks"]) for o in options.values()] == [("fsdp", 2), ("ddp", 2)]
    sharded, whole = weights(output), weights(tmp_path / "out")
    assert sharded.keys() == whole.keys()
    for name, value in sharded.items():
        if name.endswith("_mask"):
            assert torch.equal(value, whole[name]), name
        torch.testing.assert_close(value.double(), whole[name].double(), rtol=1e-3, atol=1e-5)
    for row, other in zip(rows(output), rows(tmp_path / "out"), strict=True):
        assert row["grown"] == other["grown"]
        assert float(row["test_loss"]) == pytest.approx(float(other["test_loss"]), rel=1e-3)


@needs_fsdp2
@pytest.mark.slow
def test_the_weights_are_those_of_a_plain_model(output: Path) -> None:
    state = weights(output)
    masks = {name: state.pop(name) for name in [*state] if name.endswith("_mask")}
    mlp(64, 10).load_state_dict(state)
    assert all(not state[name.removesuffix("_mask")][~mask].any() for name, mask in masks.items())
    assert not list(output.glob("*.pt*"))  # no checkpoint was asked for


@needs_fsdp2
@pytest.mark.slow
def test_a_rank_that_dies_and_another_number_of_ranks_that_goes_on(output: Path, tmp_path: Path) -> None:
    options = [
        *ONE_RUN,
        "--parallel",
        "fsdp",
        "--output",
        "out",
        "--quiet",
        "--checkpoint",
        "--seeds",
        "0",
        "1",
    ]
    options[options.index("--epochs") + 1] = "8"
    process = torchrun(tmp_path, 2, *options)
    file = tmp_path / "out" / "checkpoint.pt"
    wait_until(lambda: len(rows(tmp_path / "out")) >= 3, process)
    os.kill(process_of_rank(process.pid, 1), signal.SIGKILL)
    started = time.monotonic()
    code, _, err = finished(process)
    assert code != 0
    assert time.monotonic() - started < 20
    assert f"The last complete checkpoint is {Path('out') / file.name} (sparseopt seed 0, epoch " in err
    assert "Continue with: torchrun --nproc-per-node 2 -m sparseopt_kernels train --resume out" in err

    code, _, err = run(tmp_path, 3, "--resume", "out", "--quiet")
    assert code == 0, err
    assert [row["epoch"] for row in rows(tmp_path / "out")] == [str(i) for i in range(1, 9)] * 2
    assert not Path(f"{file}-shards").exists()  # nothing is in progress any more


@needs_fsdp2
@pytest.mark.slow
def test_resumed_by_as_many_ranks_it_gives_the_same_bits(output: Path, tmp_path: Path) -> None:
    script = """
import os
os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
os.environ["TORCHELASTIC_RUN_ID"] = "test"
from dataclasses import replace
from pathlib import Path
from sparseopt_kernels.lab.training import sharded_checkpoint
from sparseopt_kernels.lab.training.config import new_config
from sparseopt_kernels.lab.training.data import load_dataset
from sparseopt_kernels.lab.training.run import Run

given = dict(epochs=4, batch_size=300, update_every=3, seeds=(0,), threads=1, warmup_epochs=1, device="cpu")
config = new_config(given | dict(lr=0.05, parallel="fsdp"))
first, second = (Run(config, load_dataset("digits"), "sparseopt", 0) for _ in range(2))
file = Path(folder) / "checkpoint.pt"
before = sharded_checkpoint.state_for(file, first)  # before the first step
sharded_checkpoint.load_from(file, first, before)
first.train_epoch(), first.train_epoch()
state = sharded_checkpoint.state_for(file, first)
sharded_checkpoint.remove_others(file, state)
sharded_checkpoint.load_from(file, second, state)
second.train_epoch(), second.train_epoch()
result = second.weights(), sorted(p.name for p in Path(f"{file}-shards").iterdir())
"""
    found, folders = on_ranks(script, tmp_path)[0]
    assert folders == ["sparseopt-seed0-epoch2"]
    expected = weights(output)
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_without_torchrun(parallel: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--parallel", parallel, "--output", tmp_path / "out") == 2
    assert (
        f"--parallel {parallel} is for several processes: start them with torchrun" in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--parallel", "fsdp", "--optimizer", "by-hand"), "by-hand does not know sharded parameters"),
        (("--parallel", "fsdp", "--channels-last"), "--channels-last is not for --parallel fsdp"),
        ((), "leave --max-restarts out"),
    ],
)
def test_what_does_not_go_together(
    options: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(distributed, "launched", lambda: True)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert train(*options, "--device", "cpu", "--output", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_experiment_of_one_process_is_not_continued_by_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--epochs", "2", "--seeds", "0", "--device", "cpu", "--quiet", "--output", tmp_path / "out")
    assert train(*options, "--checkpoint") == 0
    monkeypatch.setattr(distributed, "launched", lambda: True)
    assert train("--resume", tmp_path / "out") == 2
    assert "start it without torchrun" in capsys.readouterr().err


@pytest.mark.slow
def test_what_went_wrong_before_there_is_a_checkpoint_is_told(tmp_path: Path) -> None:
    options = (*ONE_RUN, "--min-fan-in", "60", "--output", "out", "--checkpoint")
    code, _, err = run(tmp_path, 2, *options)
    assert code != 0
    assert "min_fan_in is 60" in err
    assert "There is no checkpoint yet." in err


@pytest.mark.slow
def test_the_report_is_there_when_all_runs_have_diverged(tmp_path: Path) -> None:
    options = (*ONE_RUN, "--lr", "1e30", "--max-grad-norm", "none", "--method", "static", "--output", "out")
    code, out, _ = run(tmp_path, 2, *options, "--quiet")
    assert code != 0
    assert "diverged in epoch 1" in out
    assert (tmp_path / "out" / "curves.png").exists()


def test_errors_are_pickled_with_their_exit_code() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(TrainingError("no", exit_code=1)))
    assert (str(error), error.exit_code) == ("no", 1)


# What one rank does to others, and to itself, without torchrun.
TOGETHER = """
import os, signal, time
os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "TORCHELASTIC_RUN_ID": "test"}
from torch.utils.data import DataLoader
import sparseopt_kernels as sk
from sparseopt_kernels.lab.training import distributed, sharded_model
from sparseopt_kernels.lab.training.errors import TrainingError
from sparseopt_kernels.lab.training.stopped_ranks import told_when_stopped

result = {}
calls = []


def fail():
    calls.append(rank)
    raise TrainingError("no", exit_code=1)


try:
    distributed.from_first(fail)
except TrainingError as error:
    result["first"] = str(error), error.exit_code, calls, distributed.from_first(lambda: rank + 7)

shards = sharded_model.fully_shard


def adds_up(module, **options):
    sharded = shards(module, **options)
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)


result["gradients"] = []
for sharded_model.fully_shard in (shards, adds_up):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    masks = sk.sparsify(model, 0.5)
    try:
        sharded_model.shard(model, masks, torch.device("cpu"))
        result["gradients"].append("")
    except TrainingError as error:
        result["gradients"].append(str(error))

with told_when_stopped(lambda: "go on"):
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    time.sleep(0.2)
    os.kill(child, signal.SIGTERM)
    result["child"] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

try:
    with told_when_stopped(lambda: "go on"):
        batches = iter(DataLoader(range(100), num_workers=1, persistent_workers=True))
        next(batches)
        raise ValueError("in mid-epoch")
except ValueError as error:
    result["loading"] = str(error)  # its traceback holds the process that loads data
del batches
"""


@needs_fsdp2
@pytest.mark.slow
def test_ranks_together(tmp_path: Path) -> None:
    for rank, own in enumerate(on_ranks(TOGETHER, tmp_path, seconds=60.0)):
        assert own["first"] == ("no", 1, [0] if rank == 0 else [], 7)
        averaged, added = own["gradients"]
        assert averaged == ""
        assert "does not average gradients of sharded parameters on these devices (adds them up)" in added
        assert own["child"] == -signal.SIGTERM  # a forked process is stopped by itself
        assert own["loading"] == "in mid-epoch"
