"""The status file of a run: its content after each end, and the times when nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sleeptrain.errors import ConfigError, NonFiniteError
from sleeptrain.stop import Stopped
from sleeptrain.train import status as status_module
from sleeptrain.train.attempt import Attempt
from sleeptrain.train.status import State, Status, read_status
from tests.test_lease import write_lease

ATTEMPT = Attempt(2, ["here"], 1, None, "v1")


def found(folder: Path) -> tuple[Any, ...]:
    fields = json.loads((folder / "status.json").read_text())
    return fields["state"], fields["step"], fields["reason"], fields["exit_code"]


@pytest.fixture
def status(tmp_path: Path) -> Status:
    """The status of an attempt that began at step 5."""
    status = Status(tmp_path, writes=True)
    status.begin(ATTEMPT, 5, 500)
    return status


def test_an_attempt_is_running_until_it_ends(status: Status, tmp_path: Path) -> None:
    assert found(tmp_path) == ("running", 5, None, None)
    assert read_status(tmp_path) is not None and status.last_attempt == 2
    status.end(State.FINISHED)
    assert found(tmp_path) == ("finished", 5, None, 0)
    assert Status(tmp_path, writes=True).last_attempt == 2, "another attempt knows of it"


@pytest.mark.parametrize(("state", "code"), [(State.STOPPED, 75), (State.FINISHED, 0), (State.FAILED, 9)])
def test_an_end_has_its_code_and_is_the_last_word(status: Status, tmp_path: Path, state: State, code: int) -> None:
    status.end(state, "why", 9)
    assert found(tmp_path) == (state, 5, "why", code)
    status.end(State.FAILED, "later", 3)
    status.progress(6, 600, 0.0)
    assert found(tmp_path) == (state, 5, "why", code)


def test_progress_is_written_now_and_then(status: Status, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status.progress(6, 600, 0.0)
    assert found(tmp_path)[1] == 5, "it was written just now"
    monkeypatch.setattr(status_module, "INTERVAL", -1.0)
    status.progress(7, 700, 0.0)
    assert found(tmp_path)[1] == 7


def test_the_longest_save_of_any_attempt_is_kept(status: Status, tmp_path: Path) -> None:
    status.progress(6, 600, 8.0)
    status.progress(7, 700, 3.0)
    status.end(State.STOPPED)
    assert status.save_seconds == Status(tmp_path, writes=True).save_seconds == 8.0


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    status = Status(tmp_path, writes=False)
    status.begin(ATTEMPT, 0, 0)
    status.end(State.FINISHED)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_while_another_process_has_the_folder(status: Status, tmp_path: Path) -> None:
    write_lease(tmp_path)
    status.end(State.FAILED, "a mistake", 1)
    assert found(tmp_path) == ("running", 5, None, None)


def test_a_refused_start_makes_no_folder_but_is_recorded_in_one_that_exists(tmp_path: Path) -> None:
    refused = Status(tmp_path / "new", writes=True)
    refused.end(State.FAILED, "no", 2)
    assert not (tmp_path / "new").exists()
    with refused.lease:
        assert refused.lease.take()
        refused.end(State.FAILED, "no", 2)
    assert not (tmp_path / "new").exists(), "it was there for the lease alone"
    Status(tmp_path, writes=True).end(State.FAILED, "no", 2)
    assert found(tmp_path) == ("failed", 0, "no", 2)


@pytest.mark.parametrize(
    ("error", "reason", "code"),
    [
        (ConfigError("a setting", details=("a: 1 -> 2",)), "a setting\n  a: 1 -> 2", 2),
        (NonFiniteError("step 3"), "NonFiniteError: step 3", 1),
        (ValueError("two  words\nand more"), "ValueError: two words and more", 1),
        (KeyboardInterrupt(), "KeyboardInterrupt: ", 130),
    ],
)
def test_an_error_is_recorded_and_raised(
    status: Status, tmp_path: Path, error: BaseException, reason: str, code: int
) -> None:
    with pytest.raises(type(error)), status.recorded():
        raise error
    assert found(tmp_path) == ("failed", 5, reason, code)


def test_a_stop_is_no_failure(status: Status, tmp_path: Path) -> None:
    with pytest.raises(Stopped), status.recorded():
        raise Stopped
    assert found(tmp_path)[0] == "running"


def test_only_a_killed_run_gets_its_end_from_another(status: Status, tmp_path: Path) -> None:
    other = Status(tmp_path, writes=True)
    other.end_of_killed("a worker was killed", 1)
    assert found(tmp_path) == ("failed", 5, "a worker was killed", 1)
    late = Status(tmp_path, writes=True)
    late.end_of_killed("again", 3)
    assert found(tmp_path)[2] == "a worker was killed"


def test_a_disk_that_takes_no_status_does_not_end_the_run(
    status: Status, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(status_module, "write_whole", full)
    status.end(State.FINISHED)
    assert "status.json was not written: No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [
        {"state": "dreaming"},
        {"step": -1},
        {"tokens": "many"},
        {"attempt": {"number": None}},
        {"attempt": 3},
        {"progress_at": "noon"},
        {"save_seconds": None},
        {"reason": 5},
    ],
)
def test_an_invalid_status_counts_as_none(status: Status, tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "status.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | changes))
    assert read_status(tmp_path) is None
    path.write_text(json.dumps(fields))
    assert read_status(tmp_path) == fields


@pytest.mark.parametrize("text", [None, "", "[]", "{", "nul"])
def test_a_file_that_is_missing_or_torn_is_none(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "status.json").write_text(text)
    assert read_status(tmp_path) is None
    assert Status(tmp_path, writes=True).last_attempt == 0
