"""The only door to the compiled CPU library: all its names, or the reason why it is missing.

Nothing else imports ``_native``. Where it is missing, each of its names raises ``RuntimeError`` with the
reason.
"""

from __future__ import annotations

from typing import Any

MISSING: str | None = None
"""Why there is no library; None: there is one."""

try:
    from ._native import *  # noqa: F403
except ModuleNotFoundError:
    MISSING = "the native library was not built"
except ImportError as error:
    MISSING = f"the native library cannot be loaded ({error})"


def __getattr__(name: str) -> Any:
    if MISSING is None or name.startswith("__"):
        raise AttributeError(f"the native library has no {name!r}")
    raise RuntimeError(MISSING)
