"""The page of a report: well-formed whatever names it shows, and self-contained."""

from __future__ import annotations

import json
from xml.etree import ElementTree

from sleeptrain.report.groups import sections
from sleeptrain.report.page import FOLDER, MARK, POLICY, Picture, digest, escape, page
from sleeptrain.report.panels import Key, Panel
from tests.report.made import accuracy, read_run, section_of, step


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


def test_a_section_has_words_then_pictures_then_tables() -> None:
    section = section_of(read_run({}, [step(1), accuracy(1, 0.5)]))
    data = {"x": "steps", "names": {}, "curves": [["</script>&", [1], [2], "%", [0, 0, 1, 1, 0, 1, 0, 1]]]}
    panels = [Panel("One", "<svg viewBox='0 0 9 9'/>", 100.0, [Key("<b>", "red", None)], data)]
    picture = Picture("A curve", "a%2F\u00e9.png", b"png", [Key("N=1", "var(--c0)", "7 3")], panels)
    text = page("title", [(section, [picture])], [])
    body = parsed(text).find("body")
    assert body is not None and [part.text for part in body.iter("h2")] == ["Rule 110"]
    assert [(part.text or "").strip() for part in body.iter("h3")] == [
        "A curve",
        "Last values",
        "Every run",
        "Commands",
    ]
    [_, lead, *others] = [part.get("class") or part.tag for part in body]
    assert lead == "lead" and others.index("lead") < others.index("h2"), "the first screen is words"
    [link] = body.iter("a")
    assert link.attrib == {"href": "a%252F%C3%A9.png", "data-sha256": digest(b"png")}
    [panel] = [part for part in body.iter("div") if part.get("class") == "panel"]
    assert panel.get("style") == "width:130px" and panel.findtext("h4") == "One"
    assert json.loads(panel.findtext("script") or "") == data and "</script>&" not in text
    assert [(item.text, item[0].tail) for item in body.iter("li")] == [(None, "N=1"), (None, "<b>")]
    assert "experiment=rule110" in (body.findtext("pre") or "")


def test_the_page_forbids_to_load_anything() -> None:
    text = page("title", [], [])
    assert f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"/>' in text
    assert "default-src 'none'" in POLICY and " src=" not in text and "http" not in (FOLDER / "page.css").read_text()


def test_with_several_sections_the_words_of_each_lead_to_it() -> None:
    depo = read_run({}, [step(1)], base=("experiment=depo_small",))
    found = sections([read_run({}, [step(1)]), depo])
    body = parsed(page("title", [(section, []) for section in found], [])).find("body")
    assert body is not None
    assert [link.get("href") for link in body.iter("a")] == ["#rule110", "#depo"]
    assert [part.get("id") for part in body.iter("h2")] == ["rule110", "depo"]


def test_runs_that_are_not_finished_are_counted_and_listed() -> None:
    runs = [read_run({"train.seed": seed}, [step(seed)], state) for seed, state in ((1, "finished"), (2, "failed"))]
    text = page("title", [(section_of(*runs), [])], [])
    assert "1 of 2 runs are not finished:" in text and "One run FAILED." in text
    [item] = parsed(text).iter("li")
    assert item.text is not None and item.text.startswith(f"{runs[1].folder}: FAILED at step 2")


def test_settings_without_a_command_are_reported() -> None:
    section = section_of(read_run({"run.name": "a"}, [step(1)]))
    section.runs[0].config.data.source = "unknown"
    assert f"# no experiment of configs/ gives {section.runs[0].folder / 'config.yaml'}" in page(
        "", [(section, [])], []
    )
