"""``train`` from the command line: what it writes, what it says, what it refuses."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from train_command import DRIVER, TINY, rows, start, train, wait_until

import sparseopt_kernels
from sparseopt_kernels.__main__ import main
from sparseopt_kernels.lab.training import cli, run
from sparseopt_kernels.lab.training.checkpoint import load_checkpoint


def weights(output):
    return {p.name: torch.load(p, weights_only=True) for p in sorted((output / "weights").iterdir())}


def assert_same_bits(a, b):
    """Equal weights, masks and statistics, the sign of zero included."""
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].keys() == b[name].keys()
        for key, value in a[name].items():
            other = b[name][key]
            assert value.dtype == other.dtype
            assert value.numpy().tobytes() == other.numpy().tobytes(), f"{name} {key}"


def assert_same_experiment(output, expected):
    assert rows(output) == rows(expected)
    assert_same_bits(weights(output), weights(expected))


def test_files_and_their_content(uninterrupted):
    assert sorted(os.listdir(uninterrupted)) == ["config.json", "curves.png", "results.csv", "weights"]
    assert (uninterrupted / "curves.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((uninterrupted / "config.json").read_text())
    assert config["options"]["epochs"] == 4
    assert config["options"]["threads"] == 1
    assert config["torch"] == torch.__version__
    found = rows(uninterrupted)
    assert [(r["seed"], r["optimizer"]) for r in found[::4]] == [
        (seed, optimizer) for seed in "01" for optimizer in ("sgd", "sparseopt")
    ]
    assert [r["epoch"] for r in found[:4]] == ["1", "2", "3", "4"]
    assert {r["status"] for r in found} == {"ok"}
    assert float(found[-1]["train_accuracy"]) > 0.9
    assert abs(float(found[-1]["sparsity"]) - 0.95) < 1e-4
    assert float(found[0]["grown"]) > 0
    assert 0.0 <= float(found[0]["largest_share"]) <= 1.0
    assert float(found[3]["grown"]) == 0.0  # in the last quarter the masks stay
    assert float(found[3]["exploration_rate"]) > float(found[0]["exploration_rate"]) >= 0.0499


def test_min_fan_in_that_asks_for_more_weights_than_there_are(tmp_path, capsys):
    for _ in range(2):  # the folder is not taken by a run that could not begin
        assert main(["train", "--min-fan-in", "50", "--output", str(tmp_path / "new")]) == 2
    assert "min_fan_in is 50: the 512 neurons of 'fc1.weight' need 25600" in capsys.readouterr().err


def test_no_limit_of_the_norm(tmp_path):
    options = ["--max-grad-norm", "none", "--epochs", "1", "--seeds", "0", "--output", str(tmp_path / "new")]
    assert main(["train", *options, "--quiet"]) == 0
    assert json.loads((tmp_path / "new" / "config.json").read_text())["options"]["max_grad_norm"] is None


@pytest.mark.parametrize("value", ["0", "-1", "abc", "inf"])
def test_a_limit_of_the_norm_is_a_number_or_none(value, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--max-grad-norm", value])
    assert f"'{value}' is not a positive number, or none" in capsys.readouterr().err


def test_weights_are_masked_and_can_be_loaded(uninterrupted):
    state = weights(uninterrupted)["sparseopt-seed0.pt"]
    masks = [key for key in state if key.endswith("_mask")]
    assert len(masks) == 4
    assert not any(state[key.removesuffix("_mask")][~state[key]].any() for key in masks)
    active = sum(int(state[key].sum()) for key in masks)
    assert active / sum(state[key].numel() for key in masks) == pytest.approx(0.05, abs=1e-4)


@pytest.mark.slow
def test_the_same_again(uninterrupted, tmp_path):
    torch.manual_seed(12345)  # nothing of the caller's counts
    before = torch.get_rng_state(), torch.get_num_threads()
    assert train(*TINY, "--output", tmp_path / "out", "--quiet") == 0
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.get_num_threads() == before[1]
    assert_same_experiment(tmp_path / "out", uninterrupted)


@pytest.mark.slow
def test_optimizers_of_one_seed_start_from_the_same_weights_masks_and_order(tmp_path):
    """With masks of equal fan-in nothing is left that could differ."""
    options = ["--sparsity", "0", "--method", "static", "--epochs", "2", "--batch-size", "300"]
    options += ["--seeds", "3", "--threads", "1", "--device", "cpu", "--quiet"]
    assert train(*options, "--output", tmp_path) == 0
    state = weights(tmp_path)
    assert_same_bits({"": state["sgd-seed3.pt"]}, {"": state["sparseopt-seed3.pt"]})


def test_optimizers_differ_at_95_percent(uninterrupted):
    state = weights(uninterrupted)
    assert not torch.equal(state["sgd-seed0.pt"]["fc1.weight"], state["sparseopt-seed0.pt"]["fc1.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["static", "set", "rigl"])
@pytest.mark.parametrize("model", ["mlp", "convnet", "resnet20"])
def test_every_model_with_every_method(tmp_path, capsys, model, method):
    options = ["--model", model, "--method", method, "--optimizer", "sparseopt", "--seeds", "0"]
    options += ["--epochs", "2", "--batch-size", "200", "--update-every", "3", "--threads", "1", "--quiet"]
    assert train(*options, "--ham-alpha", "1", "--output", tmp_path / "new" / "folder") == 0
    table = capsys.readouterr().out
    assert "sparseopt" in table
    assert str(tmp_path / "new" / "folder" / "curves.png") in table
    first, last = rows(tmp_path / "new" / "folder")
    assert first["sparsity"] == last["sparsity"]
    assert (first["exploration_rate"] < last["exploration_rate"]) == (method != "static")


@pytest.mark.slow
def test_reference_and_native_backend_give_the_same_accuracy(tmp_path):
    if not sparseopt_kernels.build_info()["native"]:
        pytest.skip("the native library is not built")
    for backend in ("reference", "cpu"):
        assert train(*TINY, "--backend", backend, "--output", tmp_path / backend, "--quiet") == 0
    for a, b in zip(rows(tmp_path / "reference"), rows(tmp_path / "cpu"), strict=True):
        assert float(a["train_loss"]) == pytest.approx(float(b["train_loss"]), rel=1e-2)
        # One or two of 596 images: rounding grows from step to step, and masks follow.
        assert float(a["test_accuracy"]) == pytest.approx(float(b["test_accuracy"]), abs=2.5 / 596)


@pytest.mark.slow
def test_default_folders_are_numbered_and_resume_finds_the_newest(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quick = (*TINY, "--epochs", "2", "--optimizer", "sgd", "--checkpoint", "--quiet")
    assert train(*quick) == 0
    assert train(*quick, "--seeds", "5") == 0
    assert sorted(os.listdir("runs")) == ["digits-mlp-rigl-0.95", "digits-mlp-rigl-0.95-2"]
    capsys.readouterr()
    assert train("--resume", "--quiet") == 0
    assert "digits-mlp-rigl-0.95-2" in capsys.readouterr().out
    assert rows(tmp_path / "runs" / "digits-mlp-rigl-0.95-2")[0]["seed"] == "5"


def test_results_of_somebody_else_are_not_overwritten(tmp_path, capsys):
    (tmp_path / "results.csv").write_text("years of work")
    assert train(*TINY, "--output", tmp_path) == 2
    assert "results.csv" in capsys.readouterr().err
    assert (tmp_path / "results.csv").read_text() == "years of work"


@pytest.mark.slow
def test_divergence_ends_the_run_and_not_the_experiment(tmp_path, capsys, monkeypatch):
    real = run.Run._train

    def explode(self, on_step):
        loss, accuracy, lr = real(self, on_step)
        first = (self.optimizer_name, self.seed, self.epoch) == ("sgd", 0, 1)
        return (float("nan") if first else loss), accuracy, lr

    monkeypatch.setattr(run.Run, "_train", explode)
    assert train(*TINY, "--output", tmp_path / "out", "--quiet") == 0
    assert "sgd seed 0 diverged in epoch 2" in capsys.readouterr().out
    found = rows(tmp_path / "out")
    assert [r["status"] for r in found[:3]] == ["ok", "diverged", "ok"]
    assert found[1]["test_accuracy"] == "nan"
    assert len(found) == 2 + 3 * 4


@pytest.mark.slow
def test_a_learning_rate_out_of_this_world(tmp_path, capsys):
    options = (
        *TINY,
        "--optimizer",
        "sparseopt",
        "--lr",
        "1e30",
        "--output",
        tmp_path / "out",
        "--checkpoint",
    )
    assert train(*options, "--quiet") == 1
    assert "smaller --lr" in capsys.readouterr().out
    assert train("--resume", tmp_path / "out", "--quiet") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--sparsity 1", "--sparsity: '1' is not a number in [0, 1)"),
        ("--sparsity nan", "--sparsity: 'nan'"),
        ("--lr 0", "--lr: '0' is not a positive number"),
        ("--lr inf", "--lr: 'inf'"),
        ("--momentum 1", "--momentum"),
        ("--weight-decay -1", "--weight-decay"),
        ("--epochs 0", "--epochs"),
        ("--epochs 1.5", "--epochs"),
        ("--batch-size 1", "--batch-size"),
        ("--seeds -1", "--seeds"),
        ("--seeds 99999999999999999999", "--seeds"),
        ("--drop-fraction 1.1", "--drop-fraction"),
        ("--update-every 0", "--update-every"),
        ("--ham-alpha -1", "--ham-alpha"),
        ("--threads 0", "--threads"),
        ("--model vgg", "--model"),
        ("--data cifar", "--data"),
        ("--optimizer adam", "--optimizer"),
        ("--backend none", "--backend"),
    ],
)
def test_values_that_argparse_refuses(capsys, options, message):
    with pytest.raises(SystemExit) as error:
        train(*options.split())
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--epochs 2 --warmup-epochs 2", "--warmup-epochs is 2, it must be less than --epochs"),
        ("--seeds 1 1", "--seeds names something twice"),
        ("--optimizer sgd sgd", "--optimizer names something twice"),
        ("--device nonsense", "--device nonsense cannot be used"),
        ("--device cuda:99", "--device cuda:99 cannot be used"),
        ("--data-dir here", "--data-dir is not for --data digits"),
        ("--data fashion-mnist --data-dir nowhere", "--data-dir nowhere does not have"),
        ("--resume nowhere", "there is no checkpoint nowhere"),
        ("--resume", "there is no checkpoint in runs"),
    ],
)
def test_values_that_are_refused_before_training(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert train(*options.split()) == 2
    assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_an_output_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train("--output", tmp_path / "file") == 2
    assert "cannot make the output folder" in capsys.readouterr().err


def test_a_missing_package_is_named_with_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert train() == 2
    error = capsys.readouterr().err
    assert "(tqdm)" in error
    assert "run pip install '.[train]'" in error


@pytest.mark.slow
def test_resume_with_another_option_names_it(tmp_path, capsys):
    quick = (*TINY, "--epochs", "2", "--optimizer", "sgd", "--quiet")
    assert train(*quick, "--output", tmp_path, "--checkpoint") == 0
    assert train("--resume", tmp_path, "--lr", "0.2") == 2
    assert "--lr is 0.2, but the experiment in" in capsys.readouterr().err
    assert train("--resume", tmp_path, "--seeds", "0", "1", "2") == 2
    assert "was started with 0 1:" in capsys.readouterr().err
    assert train(*quick, "--resume", tmp_path) == 0  # the same options again are fine


@pytest.mark.slow
def test_a_disk_that_fills_up_in_mid_run(uninterrupted, tmp_path, monkeypatch, capsys):
    real = os.replace
    writes = []

    def replace(source, target):
        if str(target).endswith("checkpoint.pt"):
            writes.append(target)
            if len(writes) > 3:
                raise OSError(28, "No space left on device")
        real(source, target)

    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        assert train(*TINY, "--output", output, "--checkpoint", "--quiet") == 1
    error = capsys.readouterr().err
    assert "No space left" in error
    assert f"--resume {output}" in error
    assert len(load_checkpoint(output / "checkpoint.pt").progress.rows) == 2
    assert train("--resume", output, "--quiet") == 0
    assert_same_experiment(output, uninterrupted)


@pytest.mark.slow
def test_killed_again_and_again_equals_uninterrupted(uninterrupted, tmp_path):
    output = tmp_path / "out"
    options: tuple[object, ...] = (*TINY, "--output", output, "--checkpoint", "--quiet")
    for epochs in (2, 7):  # in the middle of the first run, and of the second
        process = start(tmp_path, *options)
        wait_until(lambda epochs=epochs: len(rows(output)) >= epochs, process)  # type: ignore[misc]
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        options = ("--resume", output, "--quiet")
    assert train(*options) == 0
    assert_same_experiment(output, uninterrupted)


KILLED_WHILE_WRITING = """
import os, signal
from sparseopt_kernels.lab import atomic
count = 0
def replace(source, target, real=os.replace):
    global count
    count += str(target).endswith("checkpoint.pt")
    if count == 7:
        with open(source, "r+b") as file:
            file.truncate(1000)
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)
atomic.os.replace = replace
"""


@pytest.mark.slow
def test_killed_while_writing_a_checkpoint(uninterrupted, tmp_path):
    checkpoint = tmp_path / "elsewhere" / "my.checkpoint.pt"
    options = (*TINY, "--output", tmp_path / "out", "--checkpoint", checkpoint, "--quiet")
    process = start(tmp_path, *options, driver=KILLED_WHILE_WRITING + DRIVER)
    out, err = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, out + err
    assert len(load_checkpoint(checkpoint).progress.rows) == 5
    assert train("--resume", checkpoint, "--quiet") == 0
    assert os.listdir(checkpoint.parent) == [checkpoint.name]
    assert_same_experiment(tmp_path / "out", uninterrupted)


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_finished(uninterrupted, tmp_path):
    for attempt in range(5):  # on a busy machine, it may have finished before the signal arrives
        output = tmp_path / f"out{attempt}"
        process = start(tmp_path, *TINY, "--output", output, "--checkpoint")
        wait_until(lambda: len(rows(output)) >= 2, process)  # noqa: B023
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        if process.returncode != 0:
            break
    assert process.returncode == 130, out + err
    assert "Traceback" not in err
    assert f"train --resume {output}" in out
    assert "runs did not finish" in out
    assert (output / "curves.png").exists()
    assert rows(output) == rows(uninterrupted)[: len(rows(output))]
    assert train("--resume", output, "--quiet") == 0
    assert_same_experiment(output, uninterrupted)


def test_ctrl_c_before_training(monkeypatch, tmp_path, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "open_dataset", interrupted)
    assert train("--output", tmp_path / "out") == 130
    assert "stopped" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_module_can_be_run():
    result = subprocess.run(
        [sys.executable, "-m", "sparseopt_kernels", "train", "--help"],
        capture_output=True,
        text=True,
        check=False,
        cwd=os.path.dirname(os.path.dirname(sparseopt_kernels.__file__)),
    )
    assert result.returncode == 0, result.stderr
    assert "--checkpoint" in result.stdout


def test_help_names_the_defaults(capsys):
    with pytest.raises(SystemExit):
        train("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: 0.95)" in text
    assert "40 for digits; 15 for fashion-mnist" in text
