"""Runs whose storage fails, and whose checkpoints are damaged."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sleeptrain.checkpoint import write as write_module
from sleeptrain.checkpoint.folder import checkpoints, find_damage
from sleeptrain.cli import main
from sleeptrain.config.compose import compose
from sleeptrain.errors import CheckpointError, DataError
from sleeptrain.train import trainer
from sleeptrain.train.logging.metrics import read_metrics
from sleeptrain.train.run_state import Run
from tests.checkpoint.contents import contents, of_shares
from tests.checkpoint.test_folder import SHARD, flip
from tests.checkpoint.test_write import files_of_at_most
from tests.train.test_trainer import records, run, settings


def steps_on_disk(folder: Path) -> list[int]:
    return [int(path.name.split("-")[1]) for path in checkpoints(folder / "r" / "checkpoints")]


def at_step(monkeypatch: pytest.MonkeyPatch, actions: dict[int, Callable[[Run], object]]) -> None:
    """Calls actions[step] when the run has done that step, before it saves."""
    advance = Run.advance

    def then(made: Run, *args: object) -> None:
        advance(made, *args)  # type: ignore[arg-type]
        actions.get(made.step, lambda _: None)(made)

    monkeypatch.setattr(Run, "advance", then)


def full_disk(monkeypatch: pytest.MonkeyPatch, first: int, last: int) -> None:
    """The disk has no room for the tensors of steps `first` to `last`."""
    plain = write_module._write_tensors

    def fail(folder: Path, *args: object) -> object:
        if first <= int(folder.name.split("-")[1].split(".")[0]) <= last:
            with files_of_at_most(500):
                plain(folder, *args)  # type: ignore[arg-type]
        return plain(folder, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(write_module, "_write_tensors", fail)
    at_step(monkeypatch, {step: lambda made: made.saver.wait() for step in range(first + 1, last + 2)})


def test_training_goes_on_after_a_save_that_fails_and_the_next_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "whole")
    full_disk(monkeypatch, 5, 7)
    run(tmp_path / "full")
    assert "ALARM: the checkpoint of step 6 was not written ([Errno 27] File too large" in (
        output := capsys.readouterr().err
    )
    assert "the newest on disk is that of step 3" in output
    assert steps_on_disk(tmp_path / "full") == [9, 12]
    failed = {r["step"]: r["failed_saves"] for r in records(tmp_path / "full") if "loss" in r}
    assert failed[6] == 0 and failed[8] == failed[12] == 1
    a, b = (contents(checkpoints(tmp_path / name / "r" / "checkpoints")[-1])["model"] for name in ("whole", "full"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_last_save_that_fails_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        full_disk(patch, 11, 12)
        assert main(["train", *settings(tmp_path)]) == 1
    output = capsys.readouterr().err
    assert output.splitlines()[-1].startswith("sleeptrain: the last checkpoint was not written ([Errno 27]")
    assert "goes on from step 9" in output and "Traceback" not in output
    assert steps_on_disk(tmp_path) == [6, 9] and not list((tmp_path / "r" / "checkpoints").glob(".*"))
    run(tmp_path)
    assert steps_on_disk(tmp_path) == [9, 12]
    assert [r["step"] for r in records(tmp_path) if "loss" in r] == list(range(1, 13))


def test_the_next_step_does_not_change_tensors_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saving: dict[str, torch.Tensor] = {}
    copies: dict[str, torch.Tensor] = {}

    def keep(made: Run) -> None:
        saving.update(of_shares([made.saver._snapshot.take(made.engine.local_tensors(made.carried))]))
        copies.update({name: tensor.clone() for name, tensor in saving.items()})

    def compare(made: Run) -> None:
        now = of_shares([made.engine.local_tensors(made.carried)])
        assert any(not torch.equal(now[name], copies[name]) for name in copies), "the step has changed something"
        assert all(torch.equal(saving[name], copies[name]) for name in copies)

    at_step(monkeypatch, {3: keep, 4: compare})
    run(tmp_path)
    assert saving


def test_a_new_run_that_cannot_save_does_not_begin(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "checkpoints").write_text("a file in the folder's place")
    with pytest.raises(CheckpointError, match="goes on from the start"):
        trainer.train(compose(settings(tmp_path)))
    assert not [r for r in read_metrics(tmp_path / "r" / "metrics.jsonl") if "loss" in r]


def test_records_wait_for_a_full_disk_and_no_checkpoint_is_ahead_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain: list[object] = []

    class Full:
        def __init__(self, file: object):
            self.file = file

        def write(self, _: object) -> int:
            raise OSError(28, "No space left on device")

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

    def fill(made: Run) -> None:
        plain.append(made.records.metrics._file)  # type: ignore[attr-defined]
        made.records.metrics._file = Full(plain[0])  # type: ignore[attr-defined]

    def empty(made: Run) -> None:
        made.records.metrics._file = plain[0]  # type: ignore[attr-defined]

    at_step(monkeypatch, {5: fill, 7: lambda made: made.saver.wait(), 8: empty})
    run(tmp_path)
    output = capsys.readouterr().err
    assert "metrics.jsonl takes no records (No space left on device); they are kept and retried" in output
    assert "ALARM: the checkpoint of step 6 was not written ([Errno 28] No space left" in output
    assert [r["step"] for r in records(tmp_path) if "loss" in r] == list(range(1, 13))


def test_a_damaged_checkpoint_is_reported_and_set_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path)
    before = records(tmp_path)
    newest = tmp_path / "r" / "checkpoints" / "step-00000012"
    flip(newest / SHARD, 0.5)
    run(tmp_path)
    output = capsys.readouterr().err
    assert f"step-00000012 is damaged (the checksum of {SHARD} is not that of manifest.json)" in output
    assert "set aside as damaged-step-00000012" in output and "going on from the checkpoint of step 9" in output
    assert records(tmp_path) == before and find_damage(newest) is None
    assert sorted(os.listdir(newest.parent)) == ["damaged-step-00000012", "latest", "step-00000009", "step-00000012"]


def test_where_all_checkpoints_are_damaged_nothing_is_changed(tmp_path: Path) -> None:
    run(tmp_path)
    for path in checkpoints(tmp_path / "r" / "checkpoints"):
        (path / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"no checkpoint in .* is whole"):
        run(tmp_path)
    assert steps_on_disk(tmp_path) == [9, 12] and records(tmp_path)[-1]["step"] == 12


def test_recompute_may_change_when_a_run_goes_on(tmp_path: Path) -> None:
    run(tmp_path)
    shutil.rmtree(tmp_path / "r" / "checkpoints" / "step-00000012")
    run(tmp_path, "sleep.recompute=pass")
    assert steps_on_disk(tmp_path) == [9, 12]
