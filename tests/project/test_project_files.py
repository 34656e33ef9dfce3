"""Versions that stand in more than one file, and have to be the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def found(pattern: str, path: str) -> list[str]:
    matches = re.findall(pattern, (ROOT / path).read_text(), re.MULTILINE)
    assert matches, f"no {pattern} in {path}"
    return matches


def pinned(package: str) -> str:
    [version] = found(rf"^{package}==([^;\s]+)", "requirements.txt")
    return version


@pytest.mark.parametrize(
    ("hooks", "package"), [("ruff-pre-commit", "ruff"), ("mirrors-clang-format", "clang-format")]
)
def test_pre_commit_runs_what_lint_runs(hooks: str, package: str) -> None:
    assert found(rf"/{hooks}\n +rev: v(\S+)", ".pre-commit-config.yaml") == [pinned(package)]


def test_the_workflow_tests_the_newest_and_the_oldest_pytorch() -> None:
    [oldest] = found(r'"torch>=([\d.]+)"', "pyproject.toml")
    tested = found(r"torch==([\d.]+)\+cpu", ".github/workflows/tests.yml")
    assert set(tested) == {pinned("torch"), f"{oldest}.0"}


def test_every_python_is_tested_and_has_wheels() -> None:
    classifiers = found(r"Python :: (3\.\d+)", "pyproject.toml")
    [tested] = found(r"^ +python: \[(.*)\]", ".github/workflows/tests.yml")
    assert re.findall(r"[\d.]+", tested) == classifiers
    assert found(r'"cp(3\d+)-\*"', "pyproject.toml") == [version.replace(".", "") for version in classifiers]
