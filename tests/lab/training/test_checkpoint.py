"""What is on the disk after a failure in the middle of writing, and what is read back."""

import errno
import io
import os
import zipfile

import pytest
import torch

from sparseopt_kernels.lab.atomic import write_atomically
from sparseopt_kernels.lab.training.checkpoint import (
    Checkpoint,
    FinishedRun,
    Progress,
    load_checkpoint,
    save_checkpoint,
)
from sparseopt_kernels.lab.training.errors import TrainingError
from sparseopt_kernels.lab.training.run import Row


def a_checkpoint(epoch):
    row = Row("sgd", 0, epoch, 0.1, 0.2, 0.3, 1 / 3, 0.95, 0.1, 0.05, 1.0, "ok", 0.1, 30, 1, 0.5)
    finished = FinishedRun("sgd", 0, {"fc.weight": [1, 2]}, {"fc.weight": [2, 1]})
    current = {"model": {"w": torch.arange(3000.0)}, "epoch": epoch}
    return Checkpoint({"lr": 0.1, "seeds": [0, 1]}, ".", Progress([row], [finished], current))


def full_disk(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def killed(*args):
    raise KeyboardInterrupt


def test_round_trip(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, a_checkpoint(3))
    loaded = load_checkpoint(path)
    assert (loaded.config, loaded.output) == ({"lr": 0.1, "seeds": [0, 1]}, ".")
    assert loaded.progress.rows == a_checkpoint(3).progress.rows
    assert loaded.progress.finished == a_checkpoint(3).progress.finished
    assert loaded.progress.current is not None
    assert torch.equal(loaded.progress.current["model"]["w"], torch.arange(3000.0))
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_leaves_the_former_checkpoint(tmp_path, monkeypatch, function):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, a_checkpoint(1))
    monkeypatch.setattr(os, function, full_disk)
    with pytest.raises(TrainingError, match=r"cannot write.*No space left.*still there") as error:
        save_checkpoint(path, a_checkpoint(2))
    assert error.value.exit_code == 1
    assert load_checkpoint(path).progress.rows[0].epoch == 1
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_a_disk_that_fills_while_writing(tmp_path):
    """/dev/full fails each write for real."""
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    path = tmp_path / "results.csv"
    path.write_bytes(b"former")
    (tmp_path / "results.csv.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"x" * 100_000)
    assert path.read_bytes() == b"former"
    assert os.listdir(tmp_path) == ["results.csv"]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_ctrl_c_while_writing_leaves_the_former_file(tmp_path, monkeypatch, function):
    path = tmp_path / "file"
    write_atomically(path, b"former")
    monkeypatch.setattr(os, function, killed)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"former"
    assert os.listdir(tmp_path) == ["file"]


def test_data_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def recorded(*arguments, real=real, name=name):
            calls.append(name)
            return real(*arguments)

        monkeypatch.setattr(os, name, recorded)
    write_atomically(tmp_path / "file", b"new")
    assert calls == ["fsync", "replace", "fsync"]  # the file, its name, the folder


def test_the_leftover_of_a_kill_is_overwritten(tmp_path):
    (tmp_path / "file.tmp").write_bytes(b"half of a very long fi")
    write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def flip_a_weight(content):
    at = content.index(torch.arange(3000.0).numpy().tobytes()) + 5000
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"not a checkpoint",
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        flip_a_weight,
    ],
    ids=["empty", "text", "half", "last-byte", "one-bit"],
)
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, a_checkpoint(1))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(TrainingError, match=r"(cannot be read as a checkpoint|is damaged)") as error:
        load_checkpoint(path)
    assert str(path) in str(error.value)


def saved(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def a_zip():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("hello", "world")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (saved({"model": torch.zeros(3)}), "is not a checkpoint of this command"),
        (saved([1, 2]), "is not a checkpoint of this command"),
        (saved({"x": pytest.approx(1)}), "cannot be read as a checkpoint"),
        (a_zip(), "cannot be read as a checkpoint"),
    ],
    ids=["weights", "list", "object", "zip"],
)
def test_another_file_is_refused(tmp_path, content, message):
    path = tmp_path / "other.pt"
    path.write_bytes(content)
    with pytest.raises(TrainingError, match=message):
        load_checkpoint(path)


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(TrainingError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "none.pt")
    with pytest.raises(TrainingError, match="cannot be read"):
        load_checkpoint(tmp_path)


def test_another_version_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, a_checkpoint(1))
    content = torch.load(path, weights_only=True)
    torch.save({**content, "version": 99}, path)
    with pytest.raises(TrainingError, match="version 99"):
        load_checkpoint(path)
