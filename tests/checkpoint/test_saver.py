"""Saving while training goes on: one save at a time; failures are reported, and only the last one is an error."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from sleeptrain.checkpoint import saver as saver_module
from sleeptrain.checkpoint.folder import checkpoints
from sleeptrain.checkpoint.place import Tensors, placed
from sleeptrain.checkpoint.saver import Saver
from sleeptrain.config.schema import CheckpointConfig
from sleeptrain.errors import CheckpointError
from tests.checkpoint import contents
from tests.checkpoint.worlds import DOCUMENTS, alone, nothing, some_tensors


class Case:
    """A saver, and the lines that it has reported."""

    def __init__(self, folder: Path, **settings: int):
        self.folder, self.lines = folder, list[str]()
        self.saver = Saver(folder, alone(), CheckpointConfig(**settings), self.lines.append)

    def save(self, step: int) -> None:
        self.saver.make_way(step)
        self.saver.start(step, some_tensors(step), DOCUMENTS, nothing)

    def on_disk(self) -> list[int]:
        return [int(path.name.split("-")[1]) for path in checkpoints(self.folder)]


def test_it_keeps_the_checkpoints_that_the_settings_say(tmp_path: Path) -> None:
    case = Case(tmp_path, keep=2, keep_every=4)
    for step in range(8):
        case.save(step)
    case.saver.finish()
    assert case.on_disk() == [0, 4, 6, 7] and case.saver.newest == 7 and case.lines[-1:] != ["ALARM"]


def test_a_save_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on during a save, and two are never written at the same time."""
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
    assert case.lines == ["step 2: waiting for the checkpoint of step 1, still being written"]
    case.saver.finish()
    assert case.on_disk() == [1, 2] and most == [1]


def fail_once(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    plain = saver_module.write

    def fail(*args: object) -> None:
        monkeypatch.setattr(saver_module, "write", plain)
        raise error

    monkeypatch.setattr(saver_module, "write", fail)


def test_a_failed_save_is_reported_and_counted_and_the_next_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(tmp_path)
    case.save(1)
    case.saver.wait()
    fail_once(monkeypatch, CheckpointError("process 3: No space left on device"))
    case.save(2)
    case.saver.wait()
    assert case.lines == [
        "ALARM: the checkpoint of step 2 was not written (process 3: No space left on device); "
        "the newest on disk is that of step 1"
    ]
    assert (case.saver.failures, case.saver.newest) == (1, 1)
    case.save(3)
    case.saver.finish()
    assert (case.saver.failures, case.saver.newest, len(case.lines)) == (1, 3, 1)


def test_poll_reports_a_failure_before_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tmp_path)
    fail_once(monkeypatch, CheckpointError("broken"))
    case.save(1)
    assert case.saver._save is not None
    case.saver._save.join()
    case.saver.poll()
    assert case.lines == ["ALARM: the checkpoint of step 1 was not written (broken); none is on disk"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("error", [CheckpointError("process 0: Read-only file system"), KeyError("unforeseen")])
def test_the_last_save_must_not_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    case = Case(tmp_path)
    case.save(1)
    case.saver.wait()
    fail_once(monkeypatch, error)
    case.save(2)
    with pytest.raises(CheckpointError, match=r"last checkpoint was not written .*goes on from step 1"):
        case.saver.finish()


def test_an_old_checkpoint_that_cannot_be_removed_is_reported_and_is_no_failure(
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
    assert case.lines == ["ALARM: an old checkpoint was not removed ([Errno 13] Permission denied)"]
    assert case.on_disk() == [1, 2] and case.saver.failures == 0


def test_the_tensors_are_freed_after_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gc
    import weakref

    references: list[weakref.ref[torch.Tensor]] = []
    plain = saver_module.write

    def spy(target: Path, tensors: Tensors, *rest: Any) -> None:
        references.extend(weakref.ref(placed(tensor).tensor) for tensor in tensors.values())
        plain(target, tensors, *rest)

    monkeypatch.setattr(saver_module, "write", spy)
    case = Case(tmp_path)
    case.save(1)
    assert case.saver._save is not None
    case.saver._save.join()
    gc.collect()
    assert len(references) == 7 and all(reference() is None for reference in references)


def test_what_is_written_is_what_was_there_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write, plain = threading.Event(), saver_module.write

    def late(*args: Any) -> None:
        assert may_write.wait(30)
        plain(*args)

    monkeypatch.setattr(saver_module, "write", late)
    case, weight = Case(tmp_path), torch.ones(3)
    case.saver.start(1, {"model/x": weight}, DOCUMENTS, nothing)
    weight.fill_(2)
    may_write.set()
    case.saver.finish()
    assert contents.tensors(tmp_path / "step-00000001")["model/x"].tolist() == [1, 1, 1]
