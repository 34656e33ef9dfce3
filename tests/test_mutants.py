"""Mistakes made on purpose, one at a time: each turns tests red."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from mutants import MUTANTS
from pytest_server import PytestServer

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


def run_tests(server: PytestServer, package: Path, tests: Iterable[str], *options: str) -> tuple[int, str]:
    """The exit code and what was printed. The reference and the best instruction set will do."""
    # The words of a failure are not looked at: tests need not be rewritten for them.
    arguments = ["-q", "-p", "no:cacheprovider", "--assert=plain", *options]
    arguments += ["-m", "not slow and not compiled and not gpu", "--rootdir", str(ROOT)]
    arguments += ["-c", str(ROOT / "pyproject.toml"), *(str(ROOT / "tests" / test) for test in tests)]
    return server.run(package.parent, arguments)


@pytest.mark.parametrize("mistake", MUTANTS)
def test_a_mistake_is_found(forked_pytest: PytestServer, package: Path, mistake: str) -> None:
    mutant = MUTANTS[mistake]
    path = package / mutant.file
    source = path.read_text()
    assert source.count(mutant.old) == 1, f"{mutant.old!r} is to be in {mutant.file} once"
    path.write_text(source.replace(mutant.old, mutant.new))
    code, output = run_tests(forked_pytest, package, [mutant.test], "-x")
    # A mistake may write where it must not: a process that ends by a signal has found it, too.
    assert code == pytest.ExitCode.TESTS_FAILED or code < 0, output
    assert "NameError" not in output, output


def test_without_a_mistake_the_same_tests_pass(forked_pytest: PytestServer, package: Path) -> None:
    """With their first parameters. With all of them they pass in this very run."""
    tests = sorted({mutant.test for mutant in MUTANTS.values()})
    code, output = run_tests(forked_pytest, package, tests, "-p", "first_of_each")
    assert code == pytest.ExitCode.OK, output
