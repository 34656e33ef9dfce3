"""How Sphinx renders the documentation: ``make docs``."""

from pathlib import Path

import sparseopt_kernels

project = "sparseopt_kernels"
release = sparseopt_kernels.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_show_copyright = False
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_css_files = ["narrow.css"]

myst_heading_anchors = 3
autodoc_member_order = "bysource"
# No role may point to nothing. These point to other projects, whose pages are not asked for at build time.
nitpick_ignore_regex = [
    ("py:.*", r"torch\..*"),
    ("py:.*", r"collections\.abc\..*"),
    ("py:class", r"sparseopt_kernels\.[\w.]+\.Model"),  # a type variable
    # Signatures with a process group, which is imported for type checkers only, are shown as written.
    ("py:class", "Parameter|Tensor|Distribution|DropSchedule|Group"),
]

api = (Path(__file__).parent / "api.rst").read_text()
missing = [name for name in sparseopt_kernels.__all__ if f":: {name}\n" not in api]
if missing:
    raise ValueError(f"docs/api.rst has no entry for {', '.join(missing)}")
