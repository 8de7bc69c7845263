"""The records of a run in the main process, and in the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sleeptrain.train.run_log import MainRunLog, RunLog


class Recorder:
    """Replaces the metrics file, wandb and the progress line, and records each call of a method in `calls`."""

    def __init__(self, name: str, calls: list[tuple[Any, ...]]):
        self.name, self.calls, self.failed, self.path, self.run_id = name, calls, None, Path("metrics.jsonl"), "id7"

    def __getattr__(self, method: str) -> Any:
        return lambda *arguments: self.calls.append((self.name, method, *arguments))


@pytest.fixture
def calls() -> list[tuple[Any, ...]]:
    return []


@pytest.fixture
def log(calls: list[tuple[Any, ...]]) -> Any:
    return MainRunLog(*(Recorder(name, calls) for name in ("metrics", "wandb", "line")))  # type: ignore[arg-type]


def test_a_record_goes_to_the_file_first_and_then_to_its_views(log: Any, calls: list[tuple[Any, ...]]) -> None:
    record = {"step": 3}
    log.write(record, 5)
    assert calls == [("metrics", "append", record), ("wandb", "log", record, 5), ("line", "update", record)]
    assert log.wandb_id == "id7"


def test_a_file_that_fails_is_reported_once_until_it_works_again(log: Any, calls: list[tuple[Any, ...]]) -> None:
    failures = iter(["No space left on device"] * 2 + [None, "No space left on device"])

    def append(record: dict[str, Any]) -> None:
        log.metrics.failed = next(failures)

    log.metrics.append = append
    messages = []
    for step in range(4):
        log.write({"step": step}, step)
        messages.append([call[2] for call in calls if call[:2] == ("line", "message")])
        calls.clear()
    alarm = "ALARM: metrics.jsonl takes no records (No space left on device); they are kept and retried"
    assert messages == [[alarm], [], [], [alarm]]


def test_the_rest_is_passed_on_and_all_three_are_closed(log: Any, calls: list[tuple[Any, ...]]) -> None:
    log.sync()
    log.truncate_after(4, 1)
    log.message("a word")
    assert calls == [("metrics", "sync"), ("metrics", "truncate_after", 4, 1), ("line", "message", "a word")]
    calls.clear()
    log.close()
    assert calls == [("line", "close"), ("metrics", "close"), ("wandb", "finish")]


def test_other_processes_write_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = RunLog()
    log.write({"step": 1}, 1)
    log.message("a word")
    log.sync()
    log.truncate_after(0, 0)
    log.close()
    assert log.wandb_id is None and capfd.readouterr() == ("", "")
