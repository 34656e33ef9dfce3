"""A plugin of pytest that runs each test function with its first parameters alone."""

from __future__ import annotations

import pytest


@pytest.hookimpl(trylast=True)  # what -m leaves
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    first = {item.nodeid.partition("[")[0]: item for item in reversed(items)}
    chosen = set(first.values())
    items[:] = [item for item in items if item in chosen]
