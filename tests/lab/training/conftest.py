"""The experiment that stopped and resumed ones are compared with."""

from __future__ import annotations

from pathlib import Path

import pytest
from train_command import TINY, train


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the tiny experiment, run in one go."""
    output = tmp_path_factory.mktemp("uninterrupted") / "out"
    assert train(*TINY, "--output", output, "--quiet") == 0
    return output
