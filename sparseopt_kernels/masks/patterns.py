"""Name patterns of layers and weights, for ``exclude``, ``include`` and the keys of ``sparsity``."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase


class Patterns:
    """Names, or shell-style patterns, of layers (``"fc"``, ``"layer1.*"``) or weights (``"fc.weight"``).

    A pattern must match a whole name: ``"layer1"`` does not match ``"layer1.conv"``. The object keeps which
    patterns have matched, so that a misspelt one can be reported.

    Args:
        argument: the name of the public function's argument, for error messages.
        patterns: the names and patterns, in the order in which they are tried.

    Raises:
        TypeError: ``patterns`` is a single string, or holds something that is no string.
    """

    def __init__(self, argument: str, patterns: Iterable[str]) -> None:
        if isinstance(patterns, str):
            raise TypeError(
                f"{argument} must be a sequence of names, not one string: use {argument}=({patterns!r},)"
            )
        self._argument = argument
        self._patterns = tuple(patterns)
        for pattern in self._patterns:
            if not isinstance(pattern, str):
                raise TypeError(f"{argument} has a {type(pattern).__name__}, it must hold names and patterns")
        self._met: set[str] = set()
        self._decisive: set[str] = set()

    def first(self, names: Iterable[str]) -> str | None:
        """Return the first pattern that matches one of the names of a weight, or None."""
        hits = [pattern for pattern in self._patterns if any(fnmatchcase(n, pattern) for n in names)]
        self._met.update(hits)
        self._decisive.update(hits[:1])
        return hits[0] if hits else None

    def match(self, names: Iterable[str]) -> bool:
        """Return True if a pattern matches one of the names of a weight."""
        return self.first(names) is not None

    def check_all_met(self, advice: str = "") -> None:
        """Raise ``ValueError`` if a pattern has matched nothing; the message ends with ``advice``."""
        for pattern in self._patterns:
            if pattern not in self._met:
                raise ValueError(
                    f"{self._argument} has {pattern!r}, which matches no maskable weight{advice}"
                )

    def check_all_decisive(self, advice: str = "") -> None:
        """Raise ``ValueError`` if a pattern was never the first to match: it has no effect."""
        self.check_all_met(advice)
        for pattern in self._patterns:
            if pattern not in self._decisive:
                raise ValueError(
                    f"{self._argument} has {pattern!r}, but patterns before it match all that it matches, "
                    "and the first match wins: put it before them"
                )
