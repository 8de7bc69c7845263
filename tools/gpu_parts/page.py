"""The report as one Markdown page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpu_parts import PARTS, load
from sleeptrain.terminal import shown

MARKS = {"ok": "ok", "failed": "**FAILED**", "cut": "**CUT**", "missing": "missing", "not run": "**not run**"}


def to_page(report: dict[str, Any]) -> str:
    """The page of a report (docs/gpu.md has its fields)."""
    small = " These are small sizes on a CPU: they prove the report, and measure nothing." if report["small"] else ""
    lines = [
        "# GPU report",
        "",
        f"{report['started']}, {report['seconds']:.0f} s of {report['limit']:.0f} s, commit {report['commit']}, "
        f"device {report['device']}.{small}",
        "",
        *table(
            ["part", "status", "seconds", ""],
            [[p["name"], MARKS[p["status"]], f"{p['seconds']:.0f}", p["reason"]] for p in report["parts"]],
        ),
    ]
    modules = {part.name: part.module for part in PARTS}
    for part in report["parts"]:
        if part["result"]:
            lines += ["", f"## {part['name'][:1].upper()}{part['name'][1:]}", "", *_lines(modules[part["name"]], part)]
    return shown("\n".join(lines)) + "\n"


def _lines(module: str, part: dict[str, Any]) -> list[str]:
    """A part that was cut may have noted less than its page needs: then the JSON has what there is."""
    try:
        return load(module).lines(part["result"])
    except (KeyError, TypeError, IndexError) as error:
        return [f"Its results are not complete ({type(error).__name__}: {error}); `report.json` has what there is."]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in row) + " |" for row in lines]
