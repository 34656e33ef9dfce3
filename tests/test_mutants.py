"""Mistakes made on purpose, one at a time, in what is kept from step to step: each turns tests red."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
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
    """A copy of the package; native libraries are part of it."""
    assert sparseopt_kernels.__file__ is not None
    return shutil.copytree(Path(sparseopt_kernels.__file__).parent, tmp_path / "sparseopt_kernels")


def run_tests(package: Path, tests: Iterable[str], *options: str) -> tuple[int, str]:
    """The exit code and what was printed. The reference and the best instruction set will do."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    command += ["-m", "not slow and not compiled and not gpu", "--rootdir", str(ROOT)]
    command += ["-c", str(ROOT / "pyproject.toml"), *(str(ROOT / "tests" / test) for test in tests)]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    env["PYTHONPATH"] = os.pathsep.join([str(package.parent), env.get("PYTHONPATH", "")])
    # Python looks for packages in the working directory even before that.
    result = subprocess.run(command, cwd=package.parent, env=env, capture_output=True, text=True)
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize("mistake", MUTANTS)
def test_a_mistake_is_found(package: Path, mistake: str) -> None:
    mutant = MUTANTS[mistake]
    path = package / mutant.file
    source = path.read_text()
    assert source.count(mutant.old) == 1, f"{mutant.old!r} is to be in {mutant.file} once"
    path.write_text(source.replace(mutant.old, mutant.new))
    code, output = run_tests(package, [mutant.test], "-x")
    assert code == pytest.ExitCode.TESTS_FAILED, output
    assert "NameError" not in output, output


def test_without_a_mistake_the_same_tests_pass(package: Path) -> None:
    code, output = run_tests(package, sorted({mutant.test for mutant in MUTANTS.values()}))
    assert code == pytest.ExitCode.OK, output
