"""Data flows one way: what each room of the package imports of the others."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "sparseopt_kernels"
BASE = {"correction", "neurons", "sharding", "splitmix", "user_warning", "text_table"}

# A room is a folder, or a module at the top. What is not named here may import nothing of the package.
MAY_IMPORT = {
    "correction": {"neurons"},
    "native_library": {"_native"},
    "masks": BASE,
    "kernels": {*BASE, "masks", "native_library", "_cuda"},
    "step": {*BASE, "masks", "native_library", "kernels"},
    "optimizer_arguments": {*BASE, "masks", "kernels"},
    "known_optimizers": set(),
    "skipped_steps": {"kernels", "sharding"},
    "optimizer": {
        *BASE,
        "masks",
        "kernels",
        "step",
        "optimizer_arguments",
        "known_optimizers",
        "skipped_steps",
    },
    "finished": {*BASE, "masks", "step"},
    "topology": {
        *BASE,
        "masks",
        "native_library",
        "kernels",
        "known_optimizers",
        "skipped_steps",
        "finished",
    },
}
ANYTHING = {"__init__", "__main__", "lab"}


def imported(path: Path) -> Iterator[str]:
    """The rooms that a file imports from."""
    package = path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [name.name.split(".") for name in node.names]
            yield from (parts[1] for parts in names if parts[0] == "sparseopt_kernels")
        if not isinstance(node, ast.ImportFrom):
            continue
        module = (node.module or "").split(".")
        if node.level or module[0] == "sparseopt_kernels":
            above = package[: len(package) + 1 - node.level] if node.level else ()
            within = [part for part in (*above, *module) if part not in ("", "sparseopt_kernels")]
            yield from within[:1] or [name.name for name in node.names]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("room", sorted({room_of(path) for path in PACKAGE.rglob("*.py")} - ANYTHING))
def test_a_room_imports_only_what_it_stands_on(room: str) -> None:
    files = [path for path in PACKAGE.rglob("*.py") if room_of(path) == room]
    found = {target: path.name for path in files for target in imported(path) if target != room}
    assert {target: file for target, file in found.items() if target not in MAY_IMPORT.get(room, {})} == {}


def test_only_the_command_imports_the_lab() -> None:
    assert not any("lab" in rooms for rooms in MAY_IMPORT.values())
    assert "lab" not in {*imported(PACKAGE / "__init__.py")}
