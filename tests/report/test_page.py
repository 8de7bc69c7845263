"""The page of a report: well-formed whatever names it shows, and self-contained."""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path
from xml.etree import ElementTree

from sleeptrain.report.page import MARK, escape, page
from tests.report.made import accuracy, make_run, only_section, step


def parsed(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))


def test_names_are_text_and_never_markup() -> None:
    assert escape("<b> & 'c' \x1b[31m") == "&lt;b&gt; &amp; &#x27;c&#x27; \\x1b[31m"
    found = parsed(page("<N> & \x00", [], ["<a>: gone"]))
    assert (found.findtext("head/title"), found.findtext("body/h1")) == ("<N> & \\x00", "<N> & \\x00")
    assert [item.text for item in found.iter("li")] == ["<a>: gone"]


def test_it_is_recognised_as_a_report_and_claims_nothing_false() -> None:
    text = page("title", [], [])
    assert MARK in text and "Left out" not in text and list(parsed(text).iter("li")) == []


def test_a_section_has_its_pictures_between_the_tables(tmp_path: Path) -> None:
    make_run(tmp_path / "a", [], [step(1), accuracy(1, 0.5)])
    body = parsed(page("title", [(only_section(tmp_path), [("A curve", b"png")])], [])).find("body")
    assert body is not None
    assert [part.text for part in body.iter("h2")] == ["Rule 110"]
    assert [part.text for part in body.iter("h3")] == ["Last values", "A curve", "Every run", "Commands"]
    [picture] = body.iter("img")
    assert picture.attrib == {"alt": "A curve", "src": f"data:image/png;base64,{b64encode(b'png').decode()}"}
    assert "experiment=rule110 run.name=a" in (body.findtext("pre") or "")


def test_runs_that_are_not_finished_are_counted_and_listed(tmp_path: Path) -> None:
    make_run(tmp_path / "a", [], [step(1)])
    make_run(tmp_path / "b", ["train.seed=1"], [step(2)], "failed", reason="lost")
    text = page("title", [(only_section(tmp_path), [])], [])
    assert "1 of 2 runs are not finished:" in text
    [item] = parsed(text).iter("li")
    assert item.text is not None and item.text.startswith(f"{tmp_path / 'b'}: FAILED at step 2")


def test_settings_without_a_command_are_reported(tmp_path: Path) -> None:
    made = make_run(tmp_path / "a", [], [step(1)])
    section = only_section(tmp_path)
    section.runs[0].config.data.source = "unknown"
    assert f"# no experiment of configs/ gives {made / 'config.yaml'}" in page("", [(section, [])], [])
