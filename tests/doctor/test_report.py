"""The findings as people, a job and programs read them."""

from __future__ import annotations

import sys

import pytest

from sleeptrain.doctor import report
from sleeptrain.doctor.finding import failed, ok, skipped

RESULTS = [
    report.Result("disk", failed("full\nto the brim", "free\nspace", free=0), 0.5),
    report.Result("data", skipped("no settings"), 0.0),
    report.Result("python", ok("3.12"), 0.25),
    report.Result("memory", ok("64 GiB"), 0.25),
]


def test_colours_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    line = report.to_lines(report.Result("disk", failed("full", "free space"), 0.0), 8, coloured=True)
    assert "\033[31mFAILED\033[0m" in line
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert not report.wants_colour()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert report.wants_colour()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not report.wants_colour()


def test_a_summary_counts_what_applies_and_names_what_failed() -> None:
    assert report.summary(RESULTS, 1.26) == "1 of 3 checks, 1.3 s: disk failed"
    assert report.summary(RESULTS[1:], 1.0) == "all good: 2 checks, 1.0 s"


def test_a_machine_of_a_job_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    assert report.brief(RESULTS, 1.0) == "node7: FAILED disk: full to the brim; free space"
    assert report.brief(RESULTS[1:], 1.0) == "node7: ok (2 checks, 1.0 s)"


def test_programs_get_the_values_of_every_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    answer = report.to_json(RESULTS, 1.0)
    assert (answer["machine"], answer["ok"], answer["seconds"]) == ("node7", False, 1.0)
    assert [check["name"] for check in answer["checks"]] == ["disk", "data", "python", "memory"]
    assert answer["checks"][0]["details"] == {"free": 0} and answer["checks"][0]["seconds"] == 0.5
    assert report.to_json(RESULTS[1:], 1.0)["ok"], "what does not apply is no failure"


def test_the_host_is_named_where_slurm_names_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURMD_NODENAME", raising=False)
    monkeypatch.setattr(report.socket, "gethostname", lambda: "node1.cluster")
    assert report.machine() == "node1"
