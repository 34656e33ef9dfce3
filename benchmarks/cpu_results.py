"""The files of what was measured on CPUs: one of each kind for each machine, in ``benchmarks/results``."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path

import torch
from comparison import THREADS, Comparison

from sparseopt_kernels import __version__, build_info
from sparseopt_kernels.lab.atomic import write_atomically
from sparseopt_kernels.lab.bench.checks import WRONG

STEP, MAP = "cpu_step", "cpu_map"  # the kinds
# The status of a row. What is not checked was measured before SGD without masks was checked: in bfloat16 and
# float16 PyTorch 2.13.0's fused one is wrong.
OK, NOT_CHECKED = "ok", "not checked"
COLUMNS = (
    *("date", "version", "torch", "machine", "threads", "isa", "network", "weights", "sparsity"),
    *("floor_bytes", "copy_gb_per_s", "contestant", "p20_ms", "p50_ms", "p80_ms", "rounds", "status"),
)

Row = dict[str, str]  # by column


def path_of(folder: Path, kind: str, machine: str) -> Path:
    """The file of this kind of a machine."""
    return folder / f"{kind}-{slug(machine)}.csv"


def picture_of(folder: Path, kind: str, machine: str, isa: str) -> Path:
    """The picture that is drawn of the rows of one instruction set in that file."""
    return folder / f"{kind}-{slug(machine)}-{isa}.png"


def slug(machine: str) -> str:
    """A machine in the names of files: ``amd-epyc-zen-5-2-cores`` for ``AMD EPYC (Zen 5), 2 cores``."""
    return "-".join(re.findall(r"[a-z0-9.]+", machine.lower()))


def instruction_set() -> str:
    """The one that the native library uses: the best, or what ``SPARSEOPT_CPU_ISA`` asks for."""
    return os.environ.get("SPARSEOPT_CPU_ISA") or "".join(build_info().get("isas", ())[:1])


def rows_of(comparisons: Iterable[Comparison], machine: str) -> list[Row]:
    """A row for each contestant, as measured today; one that is wrong has no times."""
    about = (date.today(), __version__, torch.__version__, machine, THREADS, instruction_set())
    rows = []
    for c in comparisons:
        network = (c.network, c.weights, c.sparsity, c.floor_bytes, f"{c.copy_gb_per_s:.2f}")
        for name, times in c.times.items():
            ms = (f"{each:.4f}" for each in (times.p20_ms, times.p50_ms, times.p80_ms))
            values = (*about, *network, name, *ms, times.rounds, OK)
            rows.append(dict(zip(COLUMNS, map(str, values), strict=True)))
        for name in c.wrong:
            values = (*about, *network, name, "", "", "", 0, WRONG)
            rows.append(dict(zip(COLUMNS, map(str, values), strict=True)))
    return rows


def read(path: Path) -> list[Row]:
    """The rows of a file; none if there is no file.

    Raises:
        ValueError: its columns are others than ``COLUMNS``.
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} has the columns {reader.fieldnames}, they must be {list(COLUMNS)}")
        return list(reader)


def own_rows(path: Path, machine: str) -> list[Row]:
    """The rows of a file that is this machine's.

    Raises:
        ValueError: it has rows of another machine, or other columns.
    """
    rows = read(path)
    for row in rows:
        if row["machine"] != machine:
            raise ValueError(
                f"{path} has rows of another machine, {row['machine']!r}; this one is {machine!r}. "
                "Give that file another name: rows of a machine are replaced by that machine alone."
            )
    return rows


def replace(path: Path, rows: Sequence[Row], machine: str) -> list[Row]:
    """Put rows of this machine in the place of those of the same instruction set, network and number of
    weights, and keep the rest. All rows that the file has then are returned.

    Raises:
        ValueError: as ``own_rows``; the file is left as it was.
    """
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in own_rows(path, machine):
        groups.setdefault(_group(row), []).append(row)
    groups |= {key: [row for row in rows if _group(row) == key] for key in map(_group, rows)}
    result = [row for group in groups.values() for row in group]
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.getvalue().encode())
    return result


def timed(rows: Iterable[Row]) -> list[Row]:
    """The rows of contestants that were right, and timed."""
    return [row for row in rows if row["status"] == OK]


def wrong_in(rows: Iterable[Row]) -> str:
    """A line that names the contestants that were wrong, or nothing."""
    names = dict.fromkeys(row["contestant"] for row in rows if row["status"] == WRONG)
    return "".join(f"\nnot timed, {WRONG}: {name}" for name in names)


def caption(rows: Sequence[Row]) -> str:
    """On what, and when: below a picture of rows of one machine and instruction set."""
    row, dates = rows[0], sorted({row["date"] for row in rows})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    where = f"{row['machine']}, {row['threads']} threads, {row['isa']}"
    return f"{where}; PyTorch {row['torch']}; {when}{wrong_in(rows)}"


def _group(row: Row) -> tuple[str, ...]:
    return row["isa"], row["network"], row["weights"]
