"""Titles of pictures: sentences that are derived from the numbers drawn."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MORE = 1 + 1e-9  # as in Paired.beyond_noise: rounding is no difference
_CHARACTERS = 84  # bold letters of this size on 8 inches


def draw_title(figure: Figure, *parts: str) -> None:
    """Draw a sentence above all panels, with each of its parts on lines of its own."""
    text = "\n".join(line for part in parts for line in textwrap.wrap(part, _CHARACTERS))
    figure.suptitle(text[:1].upper() + text[1:], fontsize=11, fontweight="bold")


def only_with(runs: Mapping[str, Sequence[bool]], statement: str, inverted: str) -> str:
    """Return a sentence on the methods with which an event happens, and the number of runs.

    Args:
        runs: by method, True for each run in which it happened; a method without runs is left out.
        statement: the event, as in ``the neuron dies``.
        inverted: the event in the word order after "only", as in ``does the neuron die``.
    """
    made = {name: happened for name, happened in runs.items() if happened}
    counts = {name: f"in {sum(happened)} of {len(happened)} runs" for name, happened in made.items()}
    where = [name for name, happened in made.items() if any(happened)]
    if not made:
        return "no run is made yet"
    if not where:
        return f"in no run {inverted}"
    if len(where) == 1 and len(made) > 1:
        return f"only with {where[0]} {inverted}: {counts[where[0]]}"
    return f"{statement} " + ", ".join(f"{counts[name]} with {name}" for name in where)


def beyond_noise(results: Iterable[tuple[float, float]], more: str, less: str) -> str:
    """Return a count of the settings that differ beyond noise: ``better in 1 and worse in 2 of 9``.

    Args:
        results: the mean difference of each setting and half the width of its interval; NaN is no difference.
        more, less: the words for differences above and below 0.
    """
    results = list(results)
    counts = {
        more: sum(mean > half_width * _MORE for mean, half_width in results),
        less: sum(-mean > half_width * _MORE for mean, half_width in results),
    }
    found = " and ".join(f"{word} in {count}" for word, count in counts.items() if count)
    return f"{found or f'neither {more} nor {less} in any'} of {len(results)}"
