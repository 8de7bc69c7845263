"""Saving beside the training: one at a time, failures told and passed over, the last one not."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

from sleeptrain.checkpoint import saver as saver_module
from sleeptrain.checkpoint.folder import checkpoints
from sleeptrain.checkpoint.saver import Saver
from sleeptrain.config.schema import CheckpointConfig
from sleeptrain.errors import CheckpointError
from tests.checkpoint.worlds import DOCUMENTS, alone, nothing, some_tensors


class Case:
    """A saver, and what it has told."""

    def __init__(self, folder: Path, **settings: int):
        self.folder, self.told = folder, list[str]()
        self.saver = Saver(folder, alone(), CheckpointConfig(**settings), self.told.append)

    def save(self, step: int) -> None:
        self.saver.make_way(step)
        self.saver.start(step, some_tensors(step), DOCUMENTS, nothing)

    def on_disk(self) -> list[int]:
        return [int(path.name.split("-")[1]) for path in checkpoints(self.folder)]


def test_it_keeps_what_the_settings_say(tmp_path: Path) -> None:
    case = Case(tmp_path, keep=2, keep_every=4)
    for step in range(8):
        case.save(step)
    case.saver.finish()
    assert case.on_disk() == [0, 4, 6, 7] and case.saver.newest == 7 and case.told[-1:] != ["ALARM"]


def test_the_next_one_waits_for_the_one_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on beside it, and two are never written at the same time."""
    storage, running, most = threading.Event(), [0], [0]
    plain = saver_module.write

    def slow(*args: object) -> None:
        running[0] += 1
        most[0] = max(most[0], running[0])
        assert storage.wait(30)
        plain(*args)  # type: ignore[arg-type]
        running[0] -= 1

    monkeypatch.setattr(saver_module, "write", slow)
    case = Case(tmp_path)
    case.save(1)
    case.saver.poll()
    assert case.saver.newest is None and case.on_disk() == []
    threading.Timer(0.2, storage.set).start()
    case.save(2)
    assert case.told == ["step 2: waiting for the checkpoint of step 1, still being written"]
    case.saver.finish()
    assert case.on_disk() == [1, 2] and most == [1]


def fail_once(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    plain = saver_module.write

    def fail(*args: object) -> None:
        monkeypatch.setattr(saver_module, "write", plain)
        raise error

    monkeypatch.setattr(saver_module, "write", fail)


def test_a_failure_is_told_and_counted_and_the_next_one_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tmp_path)
    case.save(1)
    case.saver.wait()
    fail_once(monkeypatch, CheckpointError("process 3: No space left on device"))
    case.save(2)
    case.saver.wait()
    assert case.told == [
        "ALARM: the checkpoint of step 2 was not written (process 3: No space left on device); "
        "the newest on disk is that of step 1"
    ]
    assert (case.saver.failures, case.saver.newest) == (1, 1)
    case.save(3)
    case.saver.finish()
    assert (case.saver.failures, case.saver.newest, len(case.told)) == (1, 3, 1)


def test_poll_tells_without_waiting_for_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tmp_path)
    fail_once(monkeypatch, CheckpointError("broken"))
    case.save(1)
    assert case.saver._save is not None
    case.saver._save.join()
    case.saver.poll()
    assert case.told == ["ALARM: the checkpoint of step 1 was not written (broken); none is on disk"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("error", [CheckpointError("process 0: Read-only file system"), KeyError("unforeseen")])
def test_the_last_one_must_not_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    case = Case(tmp_path)
    case.save(1)
    case.saver.wait()
    fail_once(monkeypatch, error)
    case.save(2)
    with pytest.raises(CheckpointError, match=r"last checkpoint was not written .*goes on from step 1"):
        case.saver.finish()


def test_an_old_one_that_cannot_be_removed_is_told_and_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(tmp_path, keep=1)
    case.save(1)
    case.saver.wait()

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(saver_module, "remove_superfluous", refuse)
    case.save(2)
    case.saver.finish()
    assert case.told == ["ALARM: an old checkpoint was not removed ([Errno 13] Permission denied)"]
    assert case.on_disk() == [1, 2] and case.saver.failures == 0


def test_the_tensors_are_let_go_when_they_are_written(tmp_path: Path) -> None:
    import gc
    import weakref

    case = Case(tmp_path)
    tensors = {"model/x": torch.zeros(10)}
    held = weakref.ref(tensors["model/x"])
    case.saver.make_way(1)
    case.saver.start(1, tensors, DOCUMENTS, nothing)
    del tensors
    assert case.saver._save is not None
    case.saver._save.join()
    gc.collect()
    assert held() is None and os.listdir(tmp_path)
