"""Sphinx: the documents as a site, `make docs`.

The source folder is the repository, so that the links between documents are the same on the site and in the repository.
"""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
INDEX = "docs/index"

project = "sleeptrain"
html_title = "sleeptrain"
copyright = "the authors of sleeptrain, Apache 2.0"
extensions = ["myst_parser"]
root_doc = INDEX
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**.md"]
exclude_patterns = [".venv*", "build", "runs", "data"]
html_theme = "furo"
html_extra_path = ["site"]
html_show_sphinx = False
# Headings get the fragments that GitHub gives them; a link to one that does not exist is a warning.
myst_heading_anchors = 4


def navigation(index: str) -> str:
    """A hidden table of contents for each section of the index: the pages of its table, in order."""
    parts = []
    for caption, section in re.findall(r"^## (.+)\n((?:(?!## ).*\n?)*)", index, re.MULTILINE):
        pages = re.findall(r"^\| \[[^\]]+\]\(([^)#]+)\.md\)", section, re.MULTILINE)
        parts.append("\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", *pages, "```"]))
    return "\n\n".join(parts)


def add_to_source(app: Sphinx, page: str, source: list[str]) -> None:
    if page == INDEX:
        source[0] += "\n" + navigation(source[0])


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_to_source)
