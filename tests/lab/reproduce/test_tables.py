"""The paper's tables, each run in small: its own recipe and command on a miniature of its data set."""

import csv
from dataclasses import replace

import pytest
from miniatures import make_cifar100, make_imagenet

from sparseopt_kernels.__main__ import main
from sparseopt_kernels.lab.reproduce.catalogue import EXPERIMENTS
from sparseopt_kernels.lab.reproduce.tables import TABLES, _resume
from sparseopt_kernels.lab.training.errors import TrainingError
from sparseopt_kernels.lab.training.run import Run

CIFAR = [name for name, table in TABLES.items() if table.recipe.data == "cifar-100"]
IMAGENET = [name for name, table in TABLES.items() if table.recipe.data == "imagenet"]


def small(name, **changes):
    """The table with a few steps in place of days, and masks that change in them."""
    table = TABLES[name]
    batch = 8 if table.recipe.data == "cifar-100" else 4
    # A smaller learning rate: without the paper's long warm-up, HAM at 0.1 leaves the numbers behind.
    recipe = replace(table.recipe, batch_size=batch, base_lr=0.01, warmup_epochs=1, update_every=1)
    return replace(table, recipe=recipe, **{"epochs": (2,), "seeds": (0,), **changes})


@pytest.fixture
def reproduce(tmp_path, monkeypatch):
    """The command on a small table; returns the exit code, the folder of the results and their rows."""

    def run(table, data_dir, *options):
        monkeypatch.setitem(EXPERIMENTS, table.name, table)
        output = tmp_path / "out"
        where = ["--data-dir", str(data_dir), "--output", str(output), "--device", "cpu", "--workers", "1"]
        code = main(["reproduce", table.name, *where, *options])
        path = output / f"{table.name}.csv"
        return code, output, list(csv.DictReader(path.open())) if path.exists() else []

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", CIFAR)
def test_a_table_of_cifar100(reproduce, tmp_path, capsys, name):
    data = make_cifar100(tmp_path / "data", train=8)
    code, output, rows = reproduce(small(name), data, "--only", "sparsity=0.95")
    assert code == 0
    assert {row["status"] for row in rows} == {"ok"}
    renormalised, paper = TABLES[name].renormalised, "dense" if TABLES[name].renormalised else "none"
    controls = {("dense", "unnormalized", "False"), ("dense", "scalar", "False")}
    controls |= {("active", optimizer, "False") for optimizer in ("sgd", "sparseopt")}
    controls = controls if renormalised else set()
    assert {(row["clip"], row["optimizer"], row["ham"]) for row in rows} == controls | {
        (paper, optimizer, ham) for optimizer in ("sgd", "sparseopt") for ham in ("True", "False")
    }
    # Each option matters.
    assert len({row["train_loss"] for row in rows}) == len(rows) == 4 + len(controls)
    assert all(float(row["exploration_rate"]) > 0.051 for row in rows)  # masks have changed
    assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert list((output / f"{name}-checkpoints").iterdir()) == []
    said = capsys.readouterr()
    assert "on one GPU if it trains on" in said.err
    assert f"one cell of the table: sparseopt reproduce {name} --only dst=" in said.err
    all_runs = 3 * len(rows)
    assert f"{all_runs - len(rows)} of {all_runs} runs are still to be made" in said.out
    assert ("over all positions, masked ones too" in said.out) == renormalised
    assert "max_grad_norm_over" not in said.err  # nothing is advised of a norm that is not limited


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGENET[::2])  # the tables are one code with other settings
def test_a_table_of_imagenet(reproduce, tmp_path, name):
    table = small(name)
    clip = table.methods[0].clip
    only = ("--only", f"clip={clip}", "sparsity=0.97", "optimizer=sparseopt", f"dst={table.dst[-1]}")
    data = make_imagenet(tmp_path / "data", train=2, val=1)
    code, _, rows = reproduce(table, data, *only, "--loader-workers", "2")
    assert code == 0
    assert [row["dst"] for row in rows] == [table.dst[-1]]
    assert {row["status"] for row in rows} == {"ok"}
    assert {float(row["lr"]) for row in rows} == {0.01 * 4 / 256}
    assert all(float(row["exploration_rate"]) > 0.031 for row in rows)


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_to_the_same_numbers(reproduce, tmp_path, monkeypatch, capsys):
    data = make_cifar100(tmp_path / "data")
    table = small("table2", epochs=(3,))
    only = ("--only", "sparsity=0.9", "optimizer=sparseopt", "ham=True")
    _, output, uninterrupted = reproduce(table, data, *only, "--amp", "bfloat16", "--channels-last")
    (output / "table2.csv").unlink()
    trained: list[Run] = []
    train_epoch = Run.train_epoch

    def stopped(run):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(run)
        return train_epoch(run)

    monkeypatch.setattr(Run, "train_epoch", stopped)
    code, _, rows = reproduce(table, data, *only, "--amp", "bfloat16", "--channels-last")
    assert (code, rows) == (130, [])
    trained.clear()
    assert reproduce(table, data, *only, "--channels-last")[0] == 1
    assert "--amp is none, but the experiment in" in capsys.readouterr().err
    code, _, rows = reproduce(table, data, *only, "--amp", "bfloat16", "--channels-last")
    assert code == 0
    assert len(trained) == 1  # the third epoch, and no other
    [row], [expected] = rows, uninterrupted
    assert {**row, "seconds": 0} == {**expected, "seconds": 0}
    assert row["amp"] == "bfloat16"
    # A row that is there is not measured again.
    trained.clear()
    capsys.readouterr()
    assert reproduce(table, data, *only)[0] == 0
    assert trained == []
    assert "all rows are in" in capsys.readouterr().err


def test_ours_stands_beside_the_papers():
    table = TABLES["table8"]
    cell = {"sparsity": 0.97, "epochs": 100, "optimizer": "sgd"}
    rows = [
        {
            **case,
            "status": "ok",
            "test_accuracy": 40.0 + case["seed"] + 5 * case["ham"] + 9 * (case["clip"] == "active"),
        }
        for case in table.cases([])
        if cell.items() <= case.items()
    ]
    lines = table.table(rows)
    # 40, 41 and 42; then the paper's.
    [line] = [line.split() for line in lines if line.startswith("SGD ") and "0.97" in line]
    assert line[:9] == [
        "SGD",
        "RigL",
        "0.97",
        "41.00",
        "±",
        "1.00",
        "41.01",
        "±",
        "0.60",
    ]
    [line] = [line.split() for line in lines if line.startswith("SGD, HAM") and "0.97" in line]
    assert line[4:10] == ["46.00", "±", "1.00", "45.29", "±", "0.49"]
    [line] = [line.split() for line in lines if line.startswith("SGD, active") and "0.97" in line]
    assert line[4:10] == ["50.00", "±", "1.00", "41.01", "±", "0.60"]
    assert "279 of 288 runs are still to be made" in lines
    assert any("The paper does not say" in line for line in lines)


def test_a_run_that_diverged_is_named_and_left_out():
    table = TABLES["table1"]
    case = table.cases([])[0]
    lines = table.table([{**case, "status": "diverged", "test_accuracy": float("nan")}])
    assert "1 runs diverged and are not in the table" in lines
    assert "nan" not in "\n".join(lines)


def test_a_damaged_checkpoint_is_named(tmp_path):
    path = tmp_path / "case.pt"
    path.write_bytes(b"nonsense")
    with pytest.raises(TrainingError, match=r"case\.pt cannot be read"):
        _resume(None, path)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", TABLES)
def test_missing_data_are_an_error_before_anything_is_measured(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(Run, "train_epoch", None)
    (tmp_path / "data").mkdir()
    where = ("--data-dir", str(tmp_path / "data"), "--output", str(tmp_path / "out"), "--device", "cpu")
    assert main(["reproduce", name, *where]) == 2
    assert str(tmp_path / "data") in capsys.readouterr().err
    assert not (tmp_path / "out" / f"{name}.csv").exists()
