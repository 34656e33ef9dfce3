"""``make gpu-first`` without a GPU: its parts are small programs here."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import zipfile
from pathlib import Path

import cuda_tools
import gpu_first
import pytest
import torch
from cuda_tools import tool
from gpu_first import FORM, OK, SKIPPED, STOPPED, Outcome, Part, parts, run, run_all
from sector_patterns import LEFT_OUT

ROOT = Path(__file__).parents[2]
NAME = "Invented GPU 80GB (PCIe)"


def part(name: str, code: str, seconds: float = 60.0) -> Part:
    return Part(name=name, about=name, seconds=seconds, command=lambda _: [sys.executable, "-c", code])


@pytest.fixture
def found_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "is_available": True,
        "get_device_name": NAME,
        "get_device_capability": (9, 0),
        "device_count": 1,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)


@pytest.fixture
def no_tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder is all of the PATH, and there is no toolkit elsewhere."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(cuda_tools, "_FOLDERS", ())
    return folder


def program(path: Path) -> Path:
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_without_a_gpu_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_first.main(tmp_path / "runs") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"This needs an NVIDIA GPU, and PyTorch {torch.__version__} finds none.\n"
    assert not list(tmp_path.iterdir())


def test_what_the_folder_contains(
    found_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A part that fails, one that is missing and one that leaves a file do not stop the others."""
    wanted = lambda folder: [  # noqa: E731
        part("broken", "print('invented reason'); exit(3)"),
        Part(name="missing", about="missing", seconds=1, command="there is no such program"),
        part("writing", f"open({str(folder / 'results.csv')!r}, 'w').write('1')"),
        part("forbidden", f"print('trying'); print('no permission'); exit({LEFT_OUT})"),
        part("patterns", "print('a table'); print('Memory delivers invented things.')"),
    ]
    monkeypatch.setattr(gpu_first, "parts", wanted)
    assert gpu_first.main(tmp_path) == 1
    [folder] = (path for path in tmp_path.iterdir() if path.is_dir())
    assert folder.name.startswith("gpu-first-invented-gpu-80gb-pcie-20")
    files = {path.name: path.read_text() for path in folder.iterdir()}
    assert files.keys() == {
        *("about.txt", "summary.txt", "results.csv"),
        *("1-broken.txt", "2-missing.txt", "3-writing.txt", "4-forbidden.txt", "5-patterns.txt"),
    }
    assert files["1-broken.txt"] == "invented reason\n"
    *lines, verdict = files["summary.txt"].splitlines()
    assert verdict == "5-patterns: Memory delivers invented things."
    ended = [line.split("  ")[1:] for line in lines[2:]]
    assert ["".join(words[:-1]).strip() for words in ended] == [
        "failed: exit status 3",
        "left out: there is no such program",
        OK,
        "left out: no permission",
        OK,
    ]
    with zipfile.ZipFile(f"{folder}.zip") as archive:
        assert {Path(name).name for name in archive.namelist() if not name.endswith("/")} == files.keys()
    *_, ask, form, _, last = capsys.readouterr().out.splitlines()
    assert ask == f"Please send {folder}.zip"
    assert FORM in form
    assert last == "Failed: broken (failed: exit status 3)"


def test_what_is_said_of_the_machine(found_gpu: None) -> None:
    said = gpu_first.about(NAME)
    assert f"device: {NAME}, compute capability 9.0" in said
    assert f"PyTorch {torch.__version__}" in said
    assert f"torch {torch.__version__}" in said.splitlines()
    assert "commit " in said
    assert os.uname().nodename not in said


@pytest.mark.slow
def test_a_part_is_ended_with_all_that_it_has_started(tmp_path: Path) -> None:
    """What it has said until then is kept."""
    beats, beating = tmp_path / "beats", tmp_path / "beating.py"
    beating.write_text(f"""
import time
for _ in range(600):
    with open({str(beats)!r}, "a") as file:
        file.write(".")
    time.sleep(0.1)
""")
    starting = "import subprocess, sys; print('said', flush=True); "
    starting += f"subprocess.run([sys.executable, {str(beating)!r}])"
    log = tmp_path / "log"
    outcome = run(part("slow", starting), 4.0, log)
    assert outcome.status == "not finished after 4 s"
    assert log.read_text() == "said\n"
    made = beats.stat().st_size
    assert made > 0
    time.sleep(0.5)
    assert beats.stat().st_size == made


@pytest.mark.slow
def test_a_part_that_does_not_want_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_first, "_GRACE", 0.2)
    log = tmp_path / "log"
    stubborn = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    assert run(
        part("stubborn", stubborn + "print(os.getpid(), flush=True); time.sleep(60)"), 4.0, log
    ).is_bad()
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)


def test_what_a_part_leaves_of_its_time_is_the_next_ones(tmp_path: Path) -> None:
    given: list[float] = []

    def command(seconds: float) -> list[str]:
        given.append(seconds)
        return [sys.executable, "-c", ""]

    wanted = [
        Part(name=str(i), about="", seconds=seconds, command=command) for i, seconds in enumerate((40, 50))
    ]
    assert [outcome.status for outcome in run_all(wanted, tmp_path)] == [OK, OK]
    assert 39 < given[0] <= 40
    assert 50 < given[1] < 90


def test_a_program_that_cannot_be_started(tmp_path: Path) -> None:
    nothing = Part(name="nothing", about="", seconds=9, command=lambda _: [str(tmp_path / "no program")])
    outcome = run(nothing, 9.0, tmp_path / "log")
    assert outcome.status.startswith("cannot be started: ")
    assert outcome.is_bad()


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_keeps_what_is_there(
    found_gpu: None, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it comes again, while a part does not want to end."""
    said = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    said += "print('said', flush=True); time.sleep(60)"
    monkeypatch.setattr(gpu_first, "_GRACE", 1.0)
    wanted = [part("first", ""), part("stopped", said), part("never", "")]
    monkeypatch.setattr(gpu_first, "parts", lambda folder: wanted)

    def interrupt() -> None:
        while not any(log.read_text() for log in tmp_path.glob("*/2-stopped.txt")):
            time.sleep(0.05)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)

    threading.Thread(target=interrupt, daemon=True).start()
    assert gpu_first.main(tmp_path) == 130
    [folder] = (path for path in tmp_path.iterdir() if path.is_dir())
    assert (folder / "2-stopped.txt").read_text() == "said\n"
    assert not (folder / "3-never.txt").exists()
    assert STOPPED in (folder / "summary.txt").read_text()
    assert Path(f"{folder}.zip").exists()


@pytest.mark.parametrize(
    ("status", "is_bad"), [(OK, False), (f"{SKIPPED}no ncu", False), (STOPPED, True), ("failed", True)]
)
def test_what_is_bad(status: str, is_bad: bool) -> None:
    assert Outcome(name="part", status=status).is_bad() is is_bad


def test_all_parts_end_within_ten_minutes(tmp_path: Path) -> None:
    """With some seconds for what is done before and after them."""
    wanted = parts(tmp_path)
    assert sum(own.seconds for own in wanted) + len(wanted) * gpu_first._GRACE <= 590
    assert sum(own.seconds for own in wanted) <= 565


def test_the_programs_of_the_parts_are_there(no_tools: Path, tmp_path: Path) -> None:
    for name in ("compute-sanitizer", "ncu"):
        program(no_tools / name)
    commands = {}
    for own in parts(tmp_path):
        assert not isinstance(own.command, str)
        commands[own.name] = own.command(100.0)
    files = [word for command in commands.values() for word in command if word.endswith(".py")]
    assert all((ROOT / file).is_file() for file in files)
    report = commands["report"]
    assert report[report.index("--folder") + 1] == str(tmp_path)
    assert float(report[report.index("--seconds") + 1]) == 95
    for check in ("memcheck", "racecheck", "synccheck"):
        assert commands[check][:3] == [str(no_tools / "compute-sanitizer"), "--tool", check]


def test_without_the_tools_of_cuda(no_tools: Path, tmp_path: Path) -> None:
    missing = {own.name: own.command for own in parts(tmp_path) if isinstance(own.command, str)}
    sanitizer = "compute-sanitizer is neither on the PATH nor in a CUDA toolkit"
    assert missing == {
        **dict.fromkeys(("memcheck", "racecheck", "synccheck"), sanitizer),
        "ncu": "ncu is neither on the PATH nor in a CUDA toolkit",
    }


def test_tools_are_found_in_the_toolkit(
    no_tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ncu", "nvcc"):
        assert tool(name) is None
    (tmp_path / "cuda" / "bin").mkdir(parents=True)
    (tmp_path / "nsight" / "2026.1").mkdir(parents=True)
    program(tmp_path / "cuda" / "bin" / "nvcc")
    program(tmp_path / "nsight" / "2026.1" / "ncu")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setattr(cuda_tools, "_FOLDERS", (f"{tmp_path}/nsight/*",))
    assert tool("nvcc") == str(tmp_path / "cuda" / "bin" / "nvcc")
    assert tool("ncu") == str(tmp_path / "nsight" / "2026.1" / "ncu")


def test_the_issue_form_asks_for_the_archive() -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "gpu_report.yml").read_text())
    assert form["name"] == FORM
    fields = {field["id"]: field for field in form["body"] if "id" in field}
    assert fields.keys() == {"archive", "device", "unusual"}
    assert "runs/gpu-first-" in fields["archive"]["attributes"]["description"]
    assert ".zip" in fields["archive"]["attributes"]["description"]
    assert [fields[name]["validations"]["required"] for name in ("archive", "device")] == [True, True]
