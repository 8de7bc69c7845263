"""The page of a report: one HTML file that contains its figures and needs no other file."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from html import escape as escape_html

from sleeptrain.report.groups import Section
from sleeptrain.report.repeat import repeat_command
from sleeptrain.report.tables import Table, common_settings, tables
from sleeptrain.terminal import printable, shown

MARK = '<meta name="generator" content="sleeptrain report"/>'  # marks a page as a report
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #2b2b33; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; } h2 { border-bottom: 1px solid #cfcfd6; margin-top: 3rem; }
img { max-width: 100%; } .wide { overflow-x: auto; } pre { background: #f4f4f7; padding: .7rem; overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; } td, th { padding: .25rem .6rem; border-bottom: 1px solid #e4e4ea;
text-align: left; vertical-align: top; } .open { color: #b3261e; font-weight: bold; } .note { color: #6a6a75; }
"""
NOTE = (
    "Training FLOPs: forward and backward of every pass, recomputation and evaluation left out, from the plan of a "
    "typical batch of each run's settings. Curves: the mean over runs that differ in seeds alone, shaded from the "
    "minimum to the maximum, each run thin."
)


def page(title: str, parts: Sequence[tuple[Section, Sequence[tuple[str, bytes]]]], unreadable: Sequence[str]) -> str:
    """The page as HTML, which is well-formed XML and loads no other file.

    parts: each section with its figures, as (title, PNG file). unreadable: runs that are left out, and the reasons.
    """
    body = "\n".join(_section(section, pictures) for section, pictures in parts)
    left_out = _open(f"Left out, because they cannot be read ({len(unreadable)}):", unreadable)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>{MARK}<title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n{left_out}<p class='note'>{escape(NOTE)}</p>\n"
        f"{body}\n</body></html>\n"
    )


def escape(text: str) -> str:
    """Escape text, so that the page is well-formed whatever characters names and settings have."""
    return escape_html(shown(text))


def _section(section: Section, pictures: Sequence[tuple[str, bytes]]) -> str:
    shared = ", ".join(f"{name} {value}" for name, value in common_settings(section))
    parts = [f"<h2>{escape(section.title)}</h2>", f"<p>All runs: {escape(shared)}.</p>" if shared else ""]
    parts += [_unfinished(section)]
    parts += [f"<p class='note'>{escape(note)}</p>" for group in section.groups for note in group.repeated]
    all_tables = tables(section)
    parts += [_table(table) for table in all_tables[:-1]]
    parts += [_picture(title, png) for title, png in pictures]
    parts += [_table(all_tables[-1]), _commands(section)]
    return "\n".join(part for part in parts if part)


def _unfinished(section: Section) -> str:
    lines = [f"{run.folder}: {run.state}" for run in section.runs if not run.finished]
    return _open(f"{len(lines)} of {len(section.runs)} runs are not finished:", lines)


def _open(head: str, lines: Sequence[str]) -> str:
    """A heading with a list of warnings; empty if there are no lines."""
    items = "".join(f"<li class='open'>{escape(line)}</li>" for line in lines)
    return f"<p>{escape(head)}</p><ul>{items}</ul>" if lines else ""


def _table(table: Table) -> str:
    header = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    rows = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    note = f"<p class='note'>{escape(table.note)}</p>" if table.note else ""
    return (
        f"<h3>{escape(table.title)}</h3>{note}<div class='wide'><table><thead><tr>{header}</tr></thead>"
        f"<tbody>\n{rows}\n</tbody></table></div>"
    )


def _picture(title: str, png: bytes) -> str:
    data = b64encode(png).decode()
    return f"<h3>{escape(title)}</h3>\n<img alt='{escape(title)}' src='data:image/png;base64,{data}'/>"


def _commands(section: Section) -> str:
    lines = []
    for run in section.runs:
        command = repeat_command(run.config)
        line = command or f"# no experiment of configs/ gives {run.folder / 'config.yaml'}"
        lines.append(printable(line, keep=""))
    note = "Each command continues its run if the run's folder exists; with another run.root it starts a new run."
    return (
        f"<h3>Commands</h3><p class='note'>{escape(note)}</p><pre>"
        + "\n".join(escape(line) for line in lines)
        + "</pre>"
    )
