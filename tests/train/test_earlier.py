"""Runs that have lost files: records are never lost with them, and every refusal names a way out."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from sleeptrain import lease as lease_module
from sleeptrain.checkpoint.folder import checkpoints
from sleeptrain.config.compose import compose
from sleeptrain.errors import ConfigError, DataError, LeaseError
from sleeptrain.report.runs import find_runs
from sleeptrain.stop import Stopped
from sleeptrain.train import trainer
from sleeptrain.train.logging.metrics import read_metrics
from sleeptrain.train.run_state import Run
from sleeptrain.train.status import State, Status, read_status
from tests.checkpoint.test_folder import SHARD, flip
from tests.checkpoint.test_runs import at_step, steps_on_disk
from tests.test_lease import write_lease
from tests.train.test_trainer import records, run, settings


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    run(folder)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run of 12 steps, with the checkpoints of 9 and 12."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path


def lose_checkpoints(run_folder: Path) -> None:
    shutil.rmtree(run_folder / "checkpoints")


def lose_checkpoints_and_records(run_folder: Path) -> None:
    lose_checkpoints(run_folder)
    (run_folder / "metrics.jsonl").unlink()


def lose_checkpoints_and_status(run_folder: Path) -> None:
    lose_checkpoints(run_folder)
    (run_folder / "status.json").unlink()


@pytest.mark.parametrize("lose", [lose_checkpoints, lose_checkpoints_and_records, lose_checkpoints_and_status])
def test_a_run_without_its_checkpoints_does_not_begin_again(folder: Path, lose: Callable[[Path], None]) -> None:
    lose(folder / "r")
    path = folder / "r" / "metrics.jsonl"
    before = path.read_bytes() if path.exists() else None
    with pytest.raises(ConfigError, match=r"records up to step 12.* run\.name, or add run\.start_over=true"):
        run(folder)
    assert (path.read_bytes() if path.exists() else None) == before
    assert not (folder / "r" / "checkpoints").exists()


def test_it_starts_over_on_request_and_keeps_the_earlier_files(
    folder: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lose_checkpoints(folder / "r")
    before = (folder / "r" / "metrics.jsonl").read_bytes()
    run(folder, "run.start_over=true")
    assert f"starts over; the earlier files of the run are kept in {folder}/r/earlier/1" in capsys.readouterr().err
    assert records(folder) == records(finished) and steps_on_disk(folder) == [9, 12]
    assert (folder / "r" / "earlier" / "1" / "metrics.jsonl").read_bytes() == before
    assert len(find_runs([folder])[0]) == len(find_runs([folder / "r" / "earlier" / "1"])[0]) == 1
    run(folder, "run.start_over=true")  # a scheduler repeats the same command
    assert "run.start_over=true: there is a checkpoint, so the run goes on from step 12" in capsys.readouterr().err
    assert [path.name for path in (folder / "r" / "earlier").iterdir()] == ["1"]


def test_damaged_checkpoints_are_kept_with_the_records(folder: Path, finished: Path) -> None:
    for path in checkpoints(folder / "r" / "checkpoints"):
        flip(path / SHARD, 0.5)
    with pytest.raises(DataError, match=r"is whole .*run\.start_over=true"):
        run(folder)
    run(folder, "run.start_over=true")
    assert records(folder) == records(finished)
    assert len(checkpoints(folder / "r" / "earlier" / "1" / "checkpoints")) == 2


def test_records_of_a_checkpoint_that_is_gone_are_kept(
    folder: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(folder / "r" / "checkpoints" / "step-00000012")
    before = (folder / "r" / "metrics.jsonl").read_bytes()
    run(folder)
    stderr = capsys.readouterr().err
    assert "the checkpoint of step 12 is gone" in stderr and "going on from the checkpoint of step 9" in stderr
    assert (folder / "r" / "metrics-before-attempt-2.jsonl").read_bytes() == before
    assert records(folder) == records(finished)
    run(folder)
    assert len(list((folder / "r").glob("metrics-*"))) == 1, "it is said once"


def test_a_run_that_has_lost_its_settings_takes_those_of_its_checkpoint(folder: Path) -> None:
    (folder / "r" / "config.yaml").unlink()
    with pytest.raises(ConfigError, match="holds a run with other settings"):
        run(folder, "optim.muon_lr=0.5")
    run(folder)
    assert (folder / "r" / "config.yaml").exists()


def test_missing_records_are_noticed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "r" / "metrics.jsonl").unlink()
    run(folder)
    assert "metrics.jsonl is gone: there are no records of the first 12 steps" in capsys.readouterr().err


def test_checkpoints_of_another_run_are_refused(folder: Path, finished: Path, tmp_path: Path) -> None:
    run(tmp_path / "other", "data.rule110.steps=3")
    lose_checkpoints(folder / "r")
    shutil.copytree(tmp_path / "other" / "r" / "checkpoints", folder / "r" / "checkpoints")
    with pytest.raises(ConfigError, match="step-00000012 is a checkpoint of a run with other settings") as refused:
        run(folder)
    assert refused.value.details == ("data.rule110.steps: 3 -> 2",)
    assert records(folder) == records(finished)


def test_a_second_start_is_refused_and_changes_nothing(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "GRACE", 0.0)
    seen: dict[str, bytes] = {}

    def start_again(made: Run) -> None:
        def contents() -> dict[str, bytes]:
            return {path.name: path.read_bytes() for path in made.folder.iterdir() if path.is_file()}

        before = contents()
        with pytest.raises(LeaseError, match=r"r is being trained by process \d+ on .*attempt 1"):
            run(tmp_path)
        with pytest.raises(ConfigError):  # refused before it looks at the lease
            run(tmp_path, "model.vocab_size=1")
        Status(made.folder, writes=True).end(State.FAILED, "a layout that does not fit", 2)
        assert contents() == before
        seen.update(before)

    at_step(monkeypatch, {4: start_again})
    run(tmp_path)
    assert "lease.json" in seen and not (tmp_path / "r" / "lease.json").exists()
    assert records(tmp_path) == records(finished)
    assert read_status(tmp_path / "r")["state"] == "finished"  # type: ignore[index]


def test_a_run_that_was_taken_over_ends_and_writes_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run paused for long, and saves a checkpoint before it notices."""
    before: dict[str, object] = {}

    def taken(made: Run) -> None:
        made.saver.wait()
        (made.folder / "lease.json").write_text("of somebody else")
        before.update(status=read_status(made.folder), records=read_metrics(made.folder / "metrics.jsonl"))

    at_step(monkeypatch, {5: taken, 7: lambda made: made.saver.wait()})
    with pytest.raises(LeaseError, match="r was taken over by process"):
        run(tmp_path)
    assert steps_on_disk(tmp_path) == [0, 3]
    assert read_status(tmp_path / "r") == before["status"]
    assert (tmp_path / "r" / "lease.json").read_text() == "of somebody else"


def test_a_run_that_waits_for_the_folder_can_be_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look = lease_module._Watch.look

    def looked(self: lease_module._Watch) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return look(self)

    monkeypatch.setattr(lease_module._Watch, "look", looked)
    write_lease(tmp_path / "r")
    with pytest.raises(Stopped):
        trainer.train(compose(settings(tmp_path)))
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["lease.json"]
