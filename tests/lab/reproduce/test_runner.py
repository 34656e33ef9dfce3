"""How the cases of an experiment are measured, kept and resumed."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch
from fake_experiment import NOTE, Fake

from sparseopt_kernels.lab.reproduce.experiment import Settings
from sparseopt_kernels.lab.reproduce.results import Results
from sparseopt_kernels.lab.reproduce.runner import measure_all
from sparseopt_kernels.lab.training.errors import TrainingError


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    return Fake(tmp_path / "trace")


def path_of(fake: Fake) -> Path:
    return fake.trace.with_name("fake.csv")


def run(fake: Fake, workers: int = 1) -> Results:
    results = Results(fake, path_of(fake))
    measure_all(results, Settings(), workers)
    return results


def numbers(fake: Fake) -> list[int]:
    """Of the rows in the file, in its order."""
    with path_of(fake).open(newline="") as file:
        return [int(row["number"]) for row in csv.DictReader(file)]


def lines(fake: Fake) -> list[str]:
    return path_of(fake).read_text().splitlines(keepends=True)


def test_what_is_read_equals_what_was_measured(fake: Fake) -> None:
    measured = run(fake).rows()
    assert len(measured) == 8
    assert [row["part"] for row in measured[:2]] == [NOTE, ""]
    assert Results(fake, path_of(fake)).rows() == measured
    for row in Results(fake, path_of(fake)).rows():
        assert {name: type(value) for name, value in row.items()} == {**fake.columns, "commit": str}


def test_after_an_interruption_only_what_is_missing_is_measured(fake: Fake) -> None:
    stopped = replace(fake, trouble={2: "interrupt"})
    with pytest.raises(KeyboardInterrupt):
        run(stopped)
    assert numbers(fake) == [0, 0, 1, 1]
    run(fake)
    assert fake.measured() == [0, 1, 2, 2, 3]
    run(fake)
    assert fake.measured() == [0, 1, 2, 2, 3]


def test_the_file_of_a_stopped_and_resumed_run_is_that_of_an_uninterrupted_one(fake: Fake) -> None:
    run(fake)
    whole = path_of(fake).read_bytes()
    kept = lines(fake)
    path_of(fake).write_text("".join([kept[0], *kept[3:5]]))  # case 1 alone
    run(fake)
    assert path_of(fake).read_bytes() == whole
    assert fake.measured() == [0, 1, 2, 3, 0, 2, 3]


@pytest.mark.slow
def test_rows_are_in_the_order_of_cases_whatever_ended_first(fake: Fake) -> None:
    order = []
    results = Results(replace(fake, trouble={0: "slow"}), path_of(fake))
    measure_all(results, Settings(), 2, lambda case: order.append(case["number"]))
    assert order != [0, 1, 2, 3]
    assert sorted(order) == [0, 1, 2, 3]
    assert numbers(fake) == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.slow
def test_one_and_two_workers_give_the_same_file(fake: Fake) -> None:
    """The fake writes down its number of threads."""
    torch.set_num_threads(2)
    run(replace(fake, final=True))
    assert torch.get_num_threads() == 2
    one = path_of(fake).read_bytes()
    path_of(fake).unlink()
    run(replace(fake, final=True), workers=2)
    assert path_of(fake).read_bytes() == one
    assert b",1," in one
    assert b",2," not in one.replace(b"\n2,", b"")


def test_cases_that_depend_on_rows_are_measured_after_them(fake: Fake) -> None:
    results = run(replace(fake, final=True))
    assert fake.measured() == [0, 1, 2, 3, 4]
    assert results.rows()[-1]["rate"] == 4 / 3
    assert numbers(fake)[-2:] == [4, 4]


def test_a_case_that_nobody_asks_for_now_stays_in_the_file(fake: Fake) -> None:
    """Remove a row that the last case depends on: the last one is not to be measured again."""
    final = replace(fake, final=True)
    run(final)
    whole = path_of(fake).read_bytes()
    kept = lines(fake)
    path_of(fake).write_text("".join([*kept[:1], *kept[5:]]))
    results = Results(final, path_of(fake))
    assert [case["number"] for case in results.missing()] == [0, 1]
    assert [row["number"] for row in results.rows()] == [2, 2, 3, 3]
    with pytest.raises(KeyboardInterrupt):
        run(replace(final, trouble={1: "interrupt"}))
    assert numbers(fake) == [0, 0, 2, 2, 3, 3, 4, 4]
    run(final)
    assert path_of(fake).read_bytes() == whole
    assert fake.measured() == [0, 1, 2, 3, 4, 0, 1, 1]


def test_a_failed_write_leaves_the_former_file(fake: Fake) -> None:
    run(replace(fake, count=2))
    before = path_of(fake).read_bytes()
    path_of(fake).with_name("fake.csv.tmp").mkdir()  # refuses root, too
    with pytest.raises(TrainingError, match=r"cannot write .*fake\.csv") as caught:
        run(fake)
    assert caught.value.exit_code == 1
    assert path_of(fake).read_bytes() == before


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_bug_names_the_case_and_the_place_and_loses_nothing(fake: Fake, workers: int) -> None:
    broken = replace(fake, trouble={1: "bug"})
    with pytest.raises(TrainingError) as caught:
        run(broken, workers)
    assert caught.value.exit_code == 1
    for words in ("fake failed at number 1, rate 0.1", "fake_experiment.py", "ZeroDivisionError: a bug"):
        assert words in str(caught.value)
    done = sorted(set(numbers(fake)))
    assert 0 in done
    assert done == sorted(set(fake.measured()) - {1})  # what was begun is kept
    run(fake)
    assert numbers(fake) == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.slow
def test_after_a_failure_what_runs_is_kept_and_nothing_else_is_begun(fake: Fake) -> None:
    with pytest.raises(TrainingError, match="number 1"):
        run(replace(fake, count=20, trouble={0: "slow", 1: "bug"}), workers=2)
    assert 0 in numbers(fake)
    assert len(fake.measured()) < 20
    assert set(numbers(fake)) == set(fake.measured()) - {1}


def test_what_the_user_can_mend_is_said_without_a_traceback(fake: Fake) -> None:
    with pytest.raises(TrainingError) as caught:
        run(replace(fake, trouble={1: "missing data"}))
    assert str(caught.value) == "fake failed at number 1, rate 0.1: data have gone"


@pytest.mark.slow
def test_a_killed_worker_is_reported(fake: Fake) -> None:
    with pytest.raises(TrainingError, match="--workers") as caught:
        run(replace(fake, trouble={3: "killed"}), workers=2)
    assert caught.value.exit_code == 1
    run(fake)
    assert numbers(fake) == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.slow
def test_workers_are_ended_when_a_result_cannot_be_kept(fake: Fake) -> None:
    path_of(fake).with_name("fake.csv.tmp").mkdir()
    with pytest.raises(TrainingError, match="cannot write"):
        run(replace(fake, trouble={1: "endless", 2: "endless", 3: "endless"}), workers=2)
    assert active_children() == []


@pytest.mark.parametrize("trouble", ["other case", "wrong type", "missing column", "no rows"])
def test_rows_that_could_not_be_read_again_are_refused_before_they_are_written(
    fake: Fake, trouble: str
) -> None:
    with pytest.raises(TypeError, match="fake measured"):
        run(replace(fake, trouble={1: trouble}))
    assert numbers(fake) == [0, 0]


def test_results_of_other_data_are_not_mixed(fake: Fake) -> None:
    run(replace(fake, count=1))
    with pytest.raises(TrainingError, match=r"results from made up, these are from others: .*--output"):
        run(replace(fake, data="others"))
    assert numbers(fake) == [0, 0]


NO_FILE_OF_THIS_EXPERIMENT = {
    "another experiment": (b"name,seed\nx,1\n", "has columns name, seed; fake has number, rate"),
    "another order": (b"rate,number,part,even,data,threads,value\n", "has columns rate, number"),
    "empty": (b"", "has columns none"),
    "not text": (b"\xff\xfe\x00", "cannot read"),
}


@pytest.mark.parametrize("kind", NO_FILE_OF_THIS_EXPERIMENT)
def test_a_file_of_something_else_is_left_alone(fake: Fake, kind: str) -> None:
    content, words = NO_FILE_OF_THIS_EXPERIMENT[kind]
    path_of(fake).write_bytes(content)
    with pytest.raises(TrainingError, match=re.escape(words)) as caught:
        run(fake)
    assert caught.value.exit_code == 2
    assert path_of(fake).read_bytes() == content
    assert fake.measured() == []


def test_a_folder_in_the_place_of_the_file(fake: Fake) -> None:
    path_of(fake).mkdir()
    with pytest.raises(TrainingError, match=r"cannot read .*fake\.csv"):
        run(fake)


DAMAGED = {
    "1,0.1,x,True,d,1,0.5": "there are 7 values, it must be 8",
    "1,0.1,x,True,d,1,0.5,abc,0.5": "there are 9 values, it must be 8",
    "one,0.1,x,True,d,1,0.5,abc": "'one'",
    "1,0.1,x,true,d,1,0.5,abc": "'true' must be True or False",
    "1,0.1,x,True,d,1,,abc": "''",
}


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line_is_named_and_nothing_is_overwritten(fake: Fake, line: str) -> None:
    run(replace(fake, count=1))
    content = path_of(fake).read_text() + f"\n{line}\n"  # an empty line does no harm
    path_of(fake).write_text(content)
    with pytest.raises(TrainingError, match=r"fake\.csv, line 5: .*" + re.escape(DAMAGED[line])) as caught:
        run(fake)
    assert "remove all lines with the same number, rate" in str(caught.value)
    assert path_of(fake).read_text() == content
    assert fake.measured() == [0]
