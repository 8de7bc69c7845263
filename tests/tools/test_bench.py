"""The output that all benchmarks share."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
ROW_KEYS = {"name", "value", "unit", "goal", "better", "ok"}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    """tools/bench.py as a module, with a benchmark that measures nothing."""
    monkeypatch.syspath_prepend(TOOLS)
    import bench
    import benchmarks

    rows = [
        benchmarks.Row("fast enough", 2.5, "x", 2.0),
        benchmarks.Row("too slow", 1.5, "x", 2.0),
        benchmarks.Row("small enough", 1.1, "x", 1.15, better="lower"),
        benchmarks.Row("without a goal", 3.0, "ms", better="lower"),
    ]
    monkeypatch.setattr(bench, "load", lambda name: SimpleNamespace(run=lambda quick: rows, METHOD="by counting"))
    return bench


def run(bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["bench.py", "ops", *arguments])
    bench.main()
    return capsys.readouterr().out


def test_json_is_one_object_on_the_last_line(bench, monkeypatch, capsys):
    report = json.loads(run(bench, monkeypatch, capsys, "--json").splitlines()[-1])
    assert report["bench"] == "ops"
    assert {"versions", "machine"} <= set(report)
    assert all(set(row) == ROW_KEYS for row in report["rows"])
    assert [row["ok"] for row in report["rows"]] == [True, False, True, True]


def test_the_table_says_which_goals_are_met(bench, monkeypatch, capsys):
    lines = run(bench, monkeypatch, capsys).splitlines()
    assert [line.split()[-1] for line in lines[-4:-1]] == ["met", "MISSED", "met"]


def test_an_unknown_benchmark_is_refused():
    done = subprocess.run(
        [sys.executable, str(TOOLS / "bench.py"), "nothing"], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 2 and "'ops'" in done.stderr and "'step'" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["checkpoint", "ops", "scale", "step"])
def test_it_measures(name):
    done = subprocess.run(
        [sys.executable, str(TOOLS / "bench.py"), name, "--json", "--quick"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert rows and all(set(row) == ROW_KEYS and row["value"] > 0 for row in rows)
