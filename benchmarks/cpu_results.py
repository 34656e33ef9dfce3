"""The result files of CPU benchmarks: one of each kind for each machine, in ``benchmarks/results``."""

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
# The status of a row. Unchecked rows were measured before the results of SGD without masks were checked:
# PyTorch 2.13.0's fused SGD is wrong in bfloat16 and float16.
OK, NOT_CHECKED = "ok", "not checked"
COLUMNS = (
    *("date", "version", "torch", "machine", "threads", "isa", "network", "weights", "sparsity", "cache"),
    *("floor_bytes", "copy_gb_per_s", "contestant", "p20_ms", "p50_ms", "p80_ms", "rounds", "status"),
)

Row = dict[str, str]  # by column


def path_of(folder: Path, kind: str, machine: str) -> Path:
    """Return the result file of a kind and machine."""
    return folder / f"{kind}-{slug(machine)}.csv"


def picture_of(folder: Path, kind: str, machine: str, isa: str) -> Path:
    """Return the picture file of a kind, machine and instruction set."""
    return folder / f"{kind}-{slug(machine)}-{isa}.png"


def slug(machine: str) -> str:
    """Return a machine's name in file names, such as ``amd-epyc-zen-5-2-cores``."""
    return "-".join(re.findall(r"[a-z0-9.]+", machine.lower()))


def instruction_set() -> str:
    """Return the native library's instruction set: ``SPARSEOPT_CPU_ISA`` if set, else the best."""
    return os.environ.get("SPARSEOPT_CPU_ISA") or "".join(build_info().get("isas", ())[:1])


def rows_of(comparisons: Iterable[Comparison], machine: str) -> list[Row]:
    """Return a row of today for each contestant; one with wrong results has no times."""
    about = (date.today(), __version__, torch.__version__, machine, THREADS, instruction_set())
    rows = []
    for c in comparisons:
        network = (c.network, c.weights, c.sparsity, c.cache, c.floor_bytes, f"{c.copy_gb_per_s:.2f}")
        for name, times in c.times.items():
            ms = (f"{each:.4f}" for each in (times.p20_ms, times.p50_ms, times.p80_ms))
            values = (*about, *network, name, *ms, times.rounds, OK)
            rows.append(dict(zip(COLUMNS, map(str, values), strict=True)))
        for name in c.wrong:
            values = (*about, *network, name, "", "", "", 0, WRONG)
            rows.append(dict(zip(COLUMNS, map(str, values), strict=True)))
    return rows


def read(path: Path) -> list[Row]:
    """Return the rows of a file; none if there is no file.

    Raises:
        ValueError: its columns are not ``COLUMNS``.
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} has the columns {reader.fieldnames}, they must be {list(COLUMNS)}")
        return list(reader)


def own_rows(path: Path, machine: str) -> list[Row]:
    """Return the rows of this machine's file.

    Raises:
        ValueError: the file has rows of another machine, or other columns.
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
    """Replace the rows of the same instruction set, network and number of weights in this machine's file, and
    return all rows of the new file.

    Raises:
        ValueError: as in ``own_rows``; the file is unchanged.
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
    """Return the rows of contestants that were right and timed."""
    return [row for row in rows if row["status"] == OK]


def wrong_in(rows: Iterable[Row]) -> str:
    """Return lines that name the contestants with wrong results, or nothing."""
    names = dict.fromkeys(row["contestant"] for row in rows if row["status"] == WRONG)
    return "".join(f"\nnot timed, {WRONG}: {name}" for name in names)


def caption(rows: Sequence[Row]) -> str:
    """Return the caption of a picture of one machine's rows: machine, instruction set, versions and dates."""
    row, dates = rows[0], sorted({row["date"] for row in rows})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    where = f"{row['machine']}, {row['threads']} threads, {row['isa']}"
    return f"{where}; PyTorch {row['torch']}; {when}{wrong_in(rows)}"


def _group(row: Row) -> tuple[str, ...]:
    return row["isa"], row["network"], row["weights"]
