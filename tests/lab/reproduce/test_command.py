"""``reproduce`` from the command line: what it writes, what it says, what it refuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from fake_experiment import Fake

import sparseopt_kernels
from sparseopt_kernels.__main__ import main
from sparseopt_kernels.lab.reproduce import cli
from sparseopt_kernels.lab.reproduce.catalogue import EXPERIMENTS

SUPPORT = Path(__file__).parents[2] / "support"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    return register(Fake(tmp_path / "trace"), monkeypatch)


def register(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> Fake:
    monkeypatch.setitem(EXPERIMENTS, "fake", fake)
    return fake


def reproduce(*options: object) -> int:
    return main(["reproduce", *map(str, options)])


def test_files_and_what_is_said(fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "folder"
    assert reproduce("fake", "--output", output, "--workers", 1) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        "the table",
        "8 rows",
        f"numbers: {output / 'fake.csv'}",
        f"picture: {output / 'fake.png'}",
    ]
    assert said.err == "fake (Section 0): 4 cases, about 4 min with 1 process\n"
    assert sorted(os.listdir(output)) == ["fake.csv", "fake.png"]
    assert (output / "fake.png").read_bytes().startswith(b"\x89PNG")


def test_quiet_prints_the_table_only(fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce("fake", "--output", tmp_path, "--workers", 1, "--quiet") == 0
    said = capsys.readouterr()
    assert said.out == "the table\n8 rows\n"
    assert said.err == ""


def test_again_nothing_is_measured_and_the_files_stay_as_they_are(
    fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("fake", "--output", tmp_path, "--workers", 1)
    assert reproduce(*options) == 0
    before = {p.name: p.read_bytes() for p in tmp_path.glob("fake.*")}
    capsys.readouterr()
    assert reproduce(*options, "--data-dir", "nowhere") == 0  # no data are needed
    assert "all rows are in" in capsys.readouterr().err
    assert fake.measured() == [0, 1, 2, 3]
    assert {p.name: p.read_bytes() for p in tmp_path.glob("fake.*")} == before


def test_resumed_after_ctrl_c(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("fake", "--output", tmp_path, "--workers", 1)
    register(replace(fake, trouble={3: "interrupt"}), monkeypatch)
    assert reproduce(*options) == 130
    assert "stopped: run the same command again to continue" in capsys.readouterr().err
    assert not (tmp_path / "fake.png").exists()
    register(fake, monkeypatch)
    assert reproduce(*options) == 0
    assert "1 case, about 60 s with 1 process; 6 rows are in the file already" in capsys.readouterr().err
    assert fake.measured() == [0, 1, 2, 3, 3]


def test_list(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce("--list") == 0
    out = capsys.readouterr().out
    for name, experiment in EXPERIMENTS.items():
        assert name in out
        assert experiment.source in out
        assert experiment.shows in out
    assert "Section 0; about 4 min with one process" in out
    assert fake.measured() == []


def test_every_experiment_is_under_its_name_and_has_a_key_of_its_columns() -> None:
    for name, experiment in EXPERIMENTS.items():
        assert experiment.name == name
        assert set(experiment.key) <= set(experiment.columns)
        cases = experiment.cases([])
        assert cases
        assert len({tuple(case.values()) for case in cases}) == len(cases)
        for case in cases:
            assert list(case) == list(experiment.key)
            assert all(type(value) is experiment.columns[column] for column, value in case.items())
            assert experiment.seconds(case) > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["figure0"], "NAME is 'figure0', it must be one of figure2, "),
        ([], "NAME is missing, it must be one of figure2, "),
        (["fake", "--data-dir", "nowhere"], "the data are nowhere"),
    ],
)
def test_refused_before_anything_is_written(
    fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert reproduce(*options, "--output", tmp_path / "out", "--quiet") == 2
    said = capsys.readouterr()
    assert f"sparseopt reproduce: error: {words}" in said.err
    assert said.out == ""
    assert fake.measured() == []
    assert list(tmp_path.glob("out/*")) == []


@pytest.mark.parametrize("workers", ["0", "-1", "2.0", "many"])
def test_workers_must_be_a_number(workers: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        reproduce("figure2", f"--workers={workers}")
    assert f"'{workers}' is not an integer of at least 1" in capsys.readouterr().err


def test_a_file_in_the_place_of_the_folder(
    fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert reproduce("fake", "--output", tmp_path / "file" / "out") == 2
    assert "cannot make the output folder" in capsys.readouterr().err
    assert fake.measured() == []


def test_a_folder_that_cannot_be_written_to_is_found_out_before_the_first_case(
    fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fake.csv.tmp").mkdir()  # what mode 0555 is to others, it is to root, too
    assert reproduce("fake", "--output", tmp_path, "--workers", 1) == 1
    assert "cannot write" in capsys.readouterr().err
    assert fake.measured() == []


def test_a_picture_that_cannot_be_written_leaves_the_numbers(
    fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fake.png.tmp").mkdir()
    assert reproduce("fake", "--output", tmp_path, "--workers", 1) == 1
    assert "fake.png" in capsys.readouterr().err
    assert len((tmp_path / "fake.csv").read_text().splitlines()) == 9


def test_a_failing_case_ends_with_1_and_keeps_the_others(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    register(replace(fake, trouble={2: "bug"}), monkeypatch)
    assert reproduce("fake", "--output", tmp_path, "--workers", 1) == 1
    assert "error: fake failed at number 2, rate 0.1" in capsys.readouterr().err
    assert len((tmp_path / "fake.csv").read_text().splitlines()) == 5


def test_missing_packages_are_named(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sparseopt_kernels.lab.training.errors.find_spec", lambda name: None)
    assert reproduce("fake", "--output", tmp_path / "out") == 2
    assert "reproduce needs packages that are not installed (numpy" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.2, "1 s"), (89.4, "89 s"), (90, "2 min"), (5399, "90 min"), (9000, "2.5 h")]
)
def test_durations(seconds: float, shown: str) -> None:
    assert cli._duration(seconds) == shown


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize("group", [True, False], ids=["terminal", "kill"])
def test_ctrl_c_keeps_what_is_finished_and_ends_the_workers_at_once(tmp_path: Path, group: bool) -> None:
    """In a terminal, Ctrl-C goes to all processes; ``kill -INT`` to one."""
    process = start(tmp_path)
    wait_for_endless_cases(tmp_path, process)
    began = time.monotonic()
    (os.killpg if group else os.kill)(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 30  # the cases would take 600 seconds
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "stopped" in err
    assert out == ""
    assert len((tmp_path / "fake.csv").read_text().splitlines()) == 5
    wait_until_the_group_is_gone(process)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_workers_of_a_killed_process_end(tmp_path: Path) -> None:
    process = start(tmp_path)
    wait_for_endless_cases(tmp_path, process)
    process.kill()
    process.communicate(timeout=60)
    wait_until_the_group_is_gone(process)


def start(folder: Path) -> subprocess.Popen[str]:
    """Two cases that end, and two that do not, in a group of processes of their own."""
    source = Path(sparseopt_kernels.__file__).parents[1]
    driver = (
        "import sys; from pathlib import Path; from fake_experiment import Fake\n"
        "from sparseopt_kernels.__main__ import main\n"
        "from sparseopt_kernels.lab.reproduce.catalogue import EXPERIMENTS\n"
        "EXPERIMENTS['fake'] = Fake(Path('trace'), trouble={2: 'endless', 3: 'endless'})\n"
        "sys.exit(main(['reproduce', 'fake', '--output', '.', '--workers', '2']))\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", driver],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(source), str(SUPPORT)])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_endless_cases(folder: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    trace, results = folder / "trace", folder / "fake.csv"
    while not (
        trace.exists()
        and len(trace.read_text().split()) == 4
        and len(results.read_text().splitlines()) == 5  # two cases of two rows, and the header
    ):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"the process ended or hung first: {process.communicate()}")
        time.sleep(0.05)


def wait_until_the_group_is_gone(process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    pytest.fail("processes were left behind")
