"""The GPU backends on CPU tensors."""

from __future__ import annotations

import pytest
from backends import emulate
from noted_launches import Launches, note_launches


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """The launches of the Triton backend, whose kernels only note them."""
    return note_launches(monkeypatch)


@pytest.fixture(params=["triton", pytest.param("cuda", marks=pytest.mark.compiled)])
def backend_name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    request.getfixturevalue("launches")
    if request.param == "cuda":
        emulate(request.getfixturevalue("cuda"), monkeypatch)
    return request.param
