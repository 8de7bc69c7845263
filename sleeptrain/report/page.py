"""The page of a report: one HTML file with its figures, which shows values at the pointer and needs no other file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from html import escape as escape_html
from pathlib import Path
from urllib.parse import quote

from sleeptrain.report.groups import Section
from sleeptrain.report.panels import Key, Panel
from sleeptrain.report.repeat import repeat_command
from sleeptrain.report.sentences import sentences
from sleeptrain.report.tables import Table, common_settings, tables
from sleeptrain.terminal import printable, shown

MARK = '<meta name="generator" content="sleeptrain report"/>'  # marks a page as a report
FOLDER = Path(__file__).parent
# Nothing is loaded from elsewhere, whatever a name or a setting may hold.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
SCALE = 1.3  # pixels in a unit of a panel, where the screen is wide enough
NOTE = (
    "Training FLOPs: forward and backward of every pass, recomputation and evaluation left out, from the plan of a "
    "typical batch of each run's settings. Curves: the mean over runs that differ in seeds alone, shaded from the "
    "minimum to the maximum, each run thin."
)


@dataclass(frozen=True)
class Picture:
    """A figure of a page. file: the name of its PNG file, whose content is `png`. keys: the legend of all panels."""

    title: str
    file: str
    png: bytes
    keys: list[Key]
    panels: list[Panel]


def page(title: str, parts: Sequence[tuple[Section, Sequence[Picture]]], unreadable: Sequence[str]) -> str:
    """The page as HTML, which is well-formed XML and loads no other file.

    parts: each section with its pictures. unreadable: runs that are left out, and the reasons.
    """
    lead = "\n".join(_lead(section, len(parts) > 1) for section, _ in parts)
    body = "\n".join(_section(section, pictures) for section, pictures in parts)
    left_out = _open(f"Left out, because they cannot be read ({len(unreadable)}):", unreadable)
    style, script = ((FOLDER / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>{MARK}<title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"/>'
        f"<style>{style}</style></head>\n<body><h1>{escape(title)}</h1>\n{lead}\n{left_out}{body}\n"
        f"<script>//<![CDATA[\n{script}//]]></script></body></html>\n"
    )


def digest(png: bytes) -> str:
    """The checksum of a picture's file, by which a later report knows that the file is of this page."""
    return sha256(png).hexdigest()


def escape(text: str) -> str:
    """Escape text, so that the page is well-formed whatever characters names and settings have."""
    return escape_html(shown(text))


def _lead(section: Section, titled: bool) -> str:
    """The first screen: what the runs of a section are and what they say, in words."""
    head = f"<h3><a href='#{section.source}'>{escape(section.title)}</a></h3>" if titled else ""
    return head + "\n".join(f"<p class='lead'>{escape(text)}</p>" for text in sentences(section)) + _unfinished(section)


def _section(section: Section, pictures: Sequence[Picture]) -> str:
    shared = ", ".join(f"{name} {value}" for name, value in common_settings(section))
    parts = [f"<h2 id='{section.source}'>{escape(section.title)}</h2>"]
    parts += [f"<p class='note'>All runs: {escape(shared)}.</p>"] if shared else []
    parts += [f"<p class='note'>{escape(note)}</p>" for group in section.groups for note in group.repeated]
    parts += [_picture(picture) for picture in pictures]
    parts += [*map(_table, tables(section)), _commands(section), f"<p class='note'>{escape(NOTE)}</p>"]
    return "\n".join(parts)


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


def _picture(picture: Picture) -> str:
    link = f"<a href='{escape(quote(picture.file))}' data-sha256='{digest(picture.png)}'>PNG</a>"
    titled = any(panel.title for panel in picture.panels)
    body = "".join(_panel(panel, titled) for panel in picture.panels)
    return (
        f"<h3>{escape(picture.title)} <small class='note'>{link}</small></h3>\n{_keys(picture.keys)}"
        f"<div class='panels'>{body}</div>"
    )


def _panel(panel: Panel, titled: bool) -> str:
    """A panel with the points of its curves. The arrow keys and the pointer choose one."""
    title = f"<h4>{escape(panel.title) or '&#160;'}</h4>" if titled else ""
    names = ", ".join(dict.fromkeys(curve[0] for curve in panel.data["curves"]))
    label = f"{panel.title or panel.data['x']}: {names}. The arrow keys choose a value."
    data = json.dumps(panel.data, ensure_ascii=True, separators=(",", ":"))
    for character in "<>&":  # neither an end of the script nor markup, in HTML and in XML
        data = data.replace(character, f"\\u{ord(character):04x}")
    return (
        f"<div class='panel' tabindex='0' role='group' aria-label='{escape(label)}' "
        f"style='width:{SCALE * panel.width:.0f}px'>"
        f"{title}{panel.svg}{_keys(panel.keys)}<div class='tip' role='status'></div>"
        f"<script type='application/json'>{data}</script></div>\n"
    )


def _keys(keys: Sequence[Key]) -> str:
    items = "".join(f"<li>{_sample(key)}{escape(key.text)}</li>" for key in keys)
    return f"<ul class='keys'>{items}</ul>" if keys else ""


def _sample(key: Key) -> str:
    stroke = f"stroke='{key.stroke}' stroke-width='2.5' stroke-dasharray='{key.dashes}'"
    mark = (
        f"<circle cx='14' cy='4' r='3' fill='{key.stroke}'/>" if key.dashes is None else f"<path d='M0 4H28' {stroke}/>"
    )
    return f"<svg viewBox='0 0 28 8' aria-hidden='true'>{mark}</svg>"


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
