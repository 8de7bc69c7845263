"""A plugin of pytest: each test's outcome is a line of JSON in a file at once, so that a suite may be cut off.

pytest -p gpu_parts.recording --record FILE
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="a line for each test that has ended")


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--record")
    if file is not None and not hasattr(config, "workerinput"):  # with workers, the process that hears from them all
        config.pluginmanager.register(Recorder(file))


class Recorder:
    def __init__(self, file: Path) -> None:
        self._file = file
        file.write_text("")

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._write({"test": report.nodeid, "outcome": "failed", "why": "it cannot be imported"})

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A test that passes or fails in its call has one line; one whose set-up skips or fails too."""
        if report.when == "call" or report.outcome != "passed":
            expected = hasattr(report, "wasxfail") and report.skipped
            outcome = "passed" if expected else report.outcome
            errors = [value for name, value in report.user_properties if name == "error"]
            self._write({"test": report.nodeid, "outcome": outcome, "why": _why(report), "errors": errors})

    def _write(self, fields: dict[str, Any]) -> None:
        with self._file.open("a") as file:
            file.write(json.dumps(fields) + "\n")


def _why(report: Any) -> str:
    """The last line of an error, or the reason of a skip."""
    if report.skipped and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    return "" if crash is None else str(crash.message).splitlines()[0][:300]
