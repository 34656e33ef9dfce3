"""What all commands have in common: notes, short errors, one sentence where something is not installed."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import sparseopt_kernels as sk
from sparseopt_kernels import __main__
from sparseopt_kernels.__main__ import main
from sparseopt_kernels.lab import doctor
from sparseopt_kernels.lab.bench import cli as bench
from sparseopt_kernels.lab.demo import cli as demo
from sparseopt_kernels.lab.reproduce import cli as reproduce
from sparseopt_kernels.lab.reproduce import runner
from sparseopt_kernels.lab.training import cli as training
from sparseopt_kernels.user_warning import show_as_notes, warn

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "doctor": (doctor, "run"),
    "bench": (bench, "_run"),
    "demo": (demo, "demonstrate"),
    "train": (training, "_run"),
    "reproduce skew": (reproduce, "_reproduce"),
}
EXTRA = ("numpy", "scipy", "sklearn", "matplotlib", "tqdm", "PIL")
BLOCKED = """
import sys
sys.modules.update(dict.fromkeys({names!r}))
"""


def run_without(names: tuple[str, ...], script: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a Python that has none of these packages."""
    code = BLOCKED.format(names=names) + script
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def command(*arguments: str) -> str:
    return f"from sparseopt_kernels.__main__ import main\nsys.exit(main({list(arguments)!r}))"


@pytest.mark.parametrize("name", COMMANDS)
def test_warnings_are_printed_as_notes(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def warning(*_: object, **__: object) -> int:
        warn("'fc.weight': invented 1.5")
        warn("'fc.weight': invented 2.5, as of another seed")
        warnings.warn("of another package", FutureWarning, stacklevel=1)
        warn("'fc.weight': invented 7.5")
        warn("1,234 neurons are dead (1,234 in 'fc.weight'), invented")
        warn("7 neurons are dead (6 in 'fc.weight', 1 in 'head.weight'), invented")
        warn("'0.weight': invented")
        warn("'3.weight': invented")
        return 0

    module, function = COMMANDS[name]
    monkeypatch.setattr(module, function, warning)
    assert main(name.split()) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note")]
    assert notes == [
        "note: 'fc.weight': invented 1.5",
        "note: 'fc.weight': invented 2.5, as of another seed",
        "note: of another package",
        "note: 1,234 neurons are dead (1,234 in 'fc.weight'), invented",
        "note: '0.weight': invented",
        "note: '3.weight': invented",
    ]


@pytest.mark.parametrize("tqdm", [None, "installed"])
def test_notes_are_printed_with_and_without_a_progress_bar(
    tqdm: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if tqdm is None:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    with warnings.catch_warnings():
        show_as_notes()
        warn("invented")
    assert capsys.readouterr().err == "note: invented\n"


def test_processes_of_reproduce_print_notes_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "_end_with_parent", lambda: None)
    with warnings.catch_warnings():
        runner._start_worker()
        warn("invented")
    assert capsys.readouterr().err == "note: invented\n"


def test_warnings_are_warnings_again_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "run", lambda _: 0)
    assert main(["doctor"]) == 0
    with pytest.warns(UserWarning, match="invented"):
        warn("invented")


def test_a_note_has_no_source_line() -> None:
    script = "import sparseopt_kernels.native_library as n; n.MISSING = 'the native library was not built'\n"
    run = run_without((), script + command("doctor"))
    assert run.returncode == 0, run.stderr
    notes = [line for line in run.stderr.splitlines() if line]
    assert len(notes) == 1
    assert notes[0].startswith("note: SparseOpt uses its slow reference backend")
    assert "then `sparseopt doctor` says: cpu tensors go to: cpu" in notes[0]
    assert "cpu tensors go to: reference" in run.stdout


@pytest.mark.parametrize("name", ["doctor", "bench", "demo", "train", "reproduce"])
def test_a_bad_argument_has_a_short_error(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main([name, "--nonsense"])
    assert error.value.code == 2
    err = capsys.readouterr().err
    assert err == (
        f"sparseopt {name}: error: unrecognized arguments: --nonsense\n"
        f"usage: sparseopt {name} --help lists what it accepts\n"
    ) or err == (
        "sparseopt: error: unrecognized arguments: --nonsense\n"
        "usage: sparseopt --help lists what it accepts\n"
    )


def test_a_bad_value_of_train_has_a_short_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["train", "--sparsity", "1.5"])
    assert error.value.code == 2
    assert capsys.readouterr().err == (
        "sparseopt train: error: argument --sparsity: '1.5' is not a number in [0, 1)\n"
        "usage: sparseopt train --help lists what it accepts\n"
    )


def test_an_unknown_command_has_a_short_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["nonsense"])
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_only_public_names_are_shown() -> None:
    assert dir(sk) == sorted(sk.__all__)
    assert sk.optimizer.SparseOpt is sk.SparseOpt


@pytest.mark.slow
def test_without_pytorch_the_import_says_what_to_do() -> None:
    run = run_without(("torch",), "import sparseopt_kernels")
    assert run.returncode == 1
    last = run.stderr.splitlines()[-1]
    assert last.startswith("ModuleNotFoundError: sparseopt_kernels needs PyTorch 2.6 or newer: ")
    assert "pip install torch" in last
    assert last.endswith("then `sparseopt doctor` says: cpu tensors go to: cpu")
    assert "During handling" not in run.stderr


@pytest.mark.slow
def test_a_pytorch_that_cannot_be_loaded_says_so_itself() -> None:
    """Something that it needs is missing: that is not mended by installing PyTorch."""
    script = """
class Broken:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torch":
            raise ModuleNotFoundError("No module named 'invented'", name="invented")
sys.meta_path.insert(0, Broken)
import sparseopt_kernels
"""
    run = run_without((), script)
    assert run.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'invented'"


@pytest.mark.slow
def test_without_the_extras_the_package_steps_and_bench_and_doctor_run() -> None:
    run = run_without(
        EXTRA,
        """
import warnings
warnings.simplefilter("error")
import sparseopt_kernels as sk, torch
model = torch.nn.Linear(64, 64)
masks = sk.sparsify(model, 0.5)
opt = sk.SparseOpt(model.parameters(), lr=0.1, momentum=0.9, masks=masks)
dst = sk.RigL(masks, update_every=1, stop_at=10, skip_step=False)
model(torch.ones(2, 64)).sum().backward(); dst.step(); opt.step()
from sparseopt_kernels.lab.bench import cli, measure
from sparseopt_kernels.lab.timing import Rounds
measure._ROUNDS = Rounds(2, warmup=0)
from sparseopt_kernels.__main__ import main
assert main(["bench", "--layers", "8x8", "--sparsity", "0.5"]) == 0
sys.exit(main(["doctor"]))
""",
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    assert "At sparsity 0.5" in run.stdout or "Other programs were running" in run.stdout
    assert "cpu tensors go to: " in run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("missing", [EXTRA, ("numpy",)], ids=["all", "numpy"])
@pytest.mark.parametrize("name", ["train", "demo", "reproduce skew"])
def test_without_the_extras_other_commands_say_what_to_install(name: str, missing: tuple[str, ...]) -> None:
    run = run_without(missing, command(*name.split()))
    assert run.returncode == 2
    [line] = run.stderr.splitlines()
    assert line.startswith(
        f"sparseopt {name.split()[0]}: error: {name.split()[0]} needs packages that are not"
    )
    assert "pip install '.[train]'" in line
    assert line.endswith("then `sparseopt doctor` lists their versions")


@pytest.mark.slow
def test_the_catalogue_is_listed_without_the_extras() -> None:
    run = run_without(EXTRA, command("reproduce", "--list"))
    assert (run.returncode, run.stderr) == (0, "")


def test_every_command_has_a_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for name in COMMANDS:
        assert f"\n    {name.split()[0]}" in text
        with pytest.raises(SystemExit) as end:
            main([name.split()[0], "--help"])
        assert end.value.code == 0
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 110


def test_subcommands_have_short_errors_too() -> None:
    parser = __main__._Parser(prog="a")
    assert isinstance(parser.add_subparsers().add_parser("b"), __main__._Parser)
    assert issubclass(__main__._Parser, argparse.ArgumentParser)
