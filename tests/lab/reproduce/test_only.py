"""``--only``, and the options of machines: what is accepted, and what it means."""

import pytest

from sparseopt_kernels.__main__ import main
from sparseopt_kernels.lab.reproduce.catalogue import EXPERIMENTS
from sparseopt_kernels.lab.reproduce.results import Results
from sparseopt_kernels.lab.reproduce.runner import measure_all


class Counting:
    """Two columns to choose cases by, and no work."""

    name, source, shows = "counting", "nowhere", "nothing"
    columns = {"a": int, "b": float, "value": float}  # noqa: RUF012
    key = ("a", "b")

    def cases(self, rows):
        return [{"a": a, "b": b} for a in (0, 1, 2) for b in (0.5, 0.9)]

    def seconds(self, case):
        return 1.0

    def check(self, settings):
        pass

    def measure(self, case, settings):
        return [{**case, "value": case["a"] + case["b"]}]

    def table(self, rows):
        return [f"{len(rows)} rows"]

    def draw(self, rows, figure):
        figure.subplots()


@pytest.fixture
def counting(tmp_path, monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "counting", Counting())
    return lambda *options: main(
        ["reproduce", "counting", "--output", str(tmp_path), "--workers", "1", "--quiet", *options]
    )


def without_commit(path):
    return [line.rpartition(",")[0] for line in path.read_text().splitlines()]


def test_only_the_cases_that_are_asked_for_are_measured_and_all_rows_are_kept(counting, tmp_path, capsys):
    assert counting("--only", "b=0.9", "a=0", "a=2") == 0
    assert without_commit(tmp_path / "counting.csv") == ["a,b,value", "0,0.9,0.9", "2,0.9,2.9"]
    assert counting("--only", "a=1", "--only", "b=0.5", "b=0.9") == 0
    rows = without_commit(tmp_path / "counting.csv")
    assert rows[1:] == ["0,0.9,0.9", "1,0.5,1.5", "1,0.9,1.9", "2,0.9,2.9"]
    assert counting() == 0
    assert "6 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--only", "c=1"), "--only has 'c=1', it must be COLUMN=VALUE with a column out of a, b"),
        (("--only", "value=1"), "it must be COLUMN=VALUE"),
        (("--only", "a"), "it must be COLUMN=VALUE"),
        (("--only", "a=x"), "--only has 'a=x': invalid literal"),
        (("--only", "a=7"), "--only a=7 leaves no case of counting"),
        (("--amp", "float16"), "--amp is for the tables, not for counting"),
        (("--loader-workers", "0"), "--loader-workers is for the tables, not for counting"),
    ],
)
def test_what_is_refused(counting, tmp_path, capsys, options, message):
    assert counting(*options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "counting.csv").exists()


def test_a_device_that_is_not_there_is_an_error_before_anything_else(tmp_path, capsys):
    assert main(["reproduce", "table1", "--device", "cuda:99", "--output", str(tmp_path / "out")]) == 2
    assert "--device cuda:99 cannot be used" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_rank_0_alone_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("sparseopt_kernels.lab.training.distributed.rank", lambda: 1)
    results = Results(Counting(), tmp_path / "counting.csv")
    measure_all(results, None, 1)  # type: ignore[arg-type]
    assert len(results.rows()) == 6
    assert list(tmp_path.iterdir()) == []
