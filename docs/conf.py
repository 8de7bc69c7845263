"""Sphinx: the documents as a site, `make docs`.

The source folder is the repository, so that the links between documents are the same on the site and in the repository.
"""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx

import sleeptrain

ROOT = Path(__file__).resolve().parents[1]
INDEX, PYTHON = "docs/index", "docs/python"

project = "sleeptrain"
html_title = "sleeptrain"
copyright = "the authors of sleeptrain, Apache 2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
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


def docstrings() -> str:
    """The docstring of each public name. Of classes also those of methods, unless torch or transformers wrote them."""
    parts = ["## Docstrings"]
    for name in sleeptrain.__all__:
        kind = "class" if name[0].isupper() else "function"
        members = ["   :members:"] if kind == "class" and name != "Config" else []
        parts.append("\n".join([f"```{{eval-rst}}\n.. auto{kind}:: sleeptrain.{name}", *members, "```"]))
    return "\n\n".join(parts)


def add_to_source(app: Sphinx, page: str, source: list[str]) -> None:
    if page == INDEX:
        source[0] += "\n" + navigation(source[0])
    if page == PYTHON:
        source[0] += "\n" + docstrings()


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_to_source)
