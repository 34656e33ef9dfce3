"""Mistakes made on purpose, one at a time, in what is kept from step to step: each turns tests red."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from mutants import MUTANTS

import sparseopt_kernels
from sparseopt_kernels.kernels import cpu as native

REASON = native.CPU.unavailable(torch.device("cpu"))
pytestmark = [
    pytest.mark.slow,
    # The reference writes all of a tensor at every step, and so mends some of the mistakes.
    pytest.mark.skipif(REASON is not None, reason=f"backend 'cpu': {REASON}"),
]
ROOT = Path(__file__).parent.parent


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package, with links to the native libraries."""
    assert sparseopt_kernels.__file__ is not None
    source, target = Path(sparseopt_kernels.__file__).parent, tmp_path / "sparseopt_kernels"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.so", "*.pyd"))
    for library in source.glob("_*.so"):
        (target / library.name).symlink_to(library)
    return target


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    """A process that runs tests: see ``pytest_server.py``."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    command = [sys.executable, str(ROOT / "tests" / "support" / "pytest_server.py")]
    with subprocess.Popen(
        command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process


def run_tests(
    server: subprocess.Popen[str], package: Path, tests: Iterable[str], *options: str
) -> tuple[int, str]:
    """The exit code and what was printed. The reference and the best instruction set will do."""
    assert server.stdin is not None
    assert server.stdout is not None
    arguments = ["-q", "-p", "no:cacheprovider", *options]
    arguments += ["-m", "not slow and not compiled and not gpu", "--rootdir", str(ROOT)]
    arguments += ["-c", str(ROOT / "pyproject.toml"), *(str(ROOT / "tests" / test) for test in tests)]
    printed = package.parent / "printed"
    print(json.dumps([str(package.parent), str(printed), *arguments]), file=server.stdin, flush=True)
    code = int(server.stdout.readline())
    return code, printed.read_text()


@pytest.mark.parametrize("mistake", MUTANTS)
def test_a_mistake_is_found(server: subprocess.Popen[str], package: Path, mistake: str) -> None:
    mutant = MUTANTS[mistake]
    path = package / mutant.file
    source = path.read_text()
    assert source.count(mutant.old) == 1, f"{mutant.old!r} is to be in {mutant.file} once"
    path.write_text(source.replace(mutant.old, mutant.new))
    code, output = run_tests(server, package, [mutant.test], "-x")
    assert code == pytest.ExitCode.TESTS_FAILED, output
    assert "NameError" not in output, output


def test_without_a_mistake_the_same_tests_pass(server: subprocess.Popen[str], package: Path) -> None:
    """With their first parameters. With all of them they pass in this very run."""
    tests = sorted({mutant.test for mutant in MUTANTS.values()})
    code, output = run_tests(server, package, tests, "-p", "first_of_each")
    assert code == pytest.ExitCode.OK, output
