"""The Python of the README and the guide runs, in order, as one reads it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]

# What a page takes for granted. The guide has it itself.
PRELUDES = {
    "README.md": """
import torch
from torch import nn
model = nn.Sequential(nn.Linear(256, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))
loss_fn = nn.CrossEntropyLoss()
loader = [(torch.randn(8, 256), torch.randint(4, (8,))) for _ in range(3)]
epochs = 100
""",
    "docs/guide.md": "",
    "docs/when-does-it-help.md": "",
}


def blocks(page: str) -> list[str]:
    """The blocks of Python of a page, each below as many empty lines as there are above it on the page."""
    text = (ROOT / page).read_text()
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return ["\n" * text.count("\n", 0, match.start(1)) + match[1] for match in found]


@pytest.mark.filterwarnings("error::UserWarning", "ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("page", PRELUDES)
def test_what_stands_on_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, on any machine: cuBLAS is not deterministic, which these tests ask PyTorch to be."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    torch.manual_seed(0)
    namespace: dict[str, Any] = {}
    exec(PRELUDES[page], namespace)
    assert blocks(page)
    for block in blocks(page):
        exec(compile(block, str(ROOT / page), "exec"), namespace)


def test_the_readme_begins_with_code_then_reasons_installation_status_and_demo() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    signs = [
        "```python",
        "- **Exact.**",
        "- **Fast.**",
        "- **Drop-in.**",
        "    pip install ",
        "| CPU |",
        "    make demo",
    ]
    found = [next(i for i, line in enumerate(lines) if line.startswith(sign)) for sign in signs]
    assert found == sorted(found)
    assert found[0] < 25
    assert found[-1] < 60


@pytest.mark.parametrize(
    "page", ["README.md", *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]
)
def test_every_link_to_a_file_leads_somewhere(page: str) -> None:
    """On GitHub, too, where Sphinx does not look."""
    folder = (ROOT / page).parent
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text())
    assert [target for target in targets if not (folder / target).exists()] == []
