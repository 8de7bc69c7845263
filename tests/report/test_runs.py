"""Which folders are runs, the facts about each, and the files that are refused."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sleeptrain.checkpoint.write import write
from sleeptrain.errors import DataError
from sleeptrain.report.runs import find_runs
from tests.checkpoint.test_folder import flip
from tests.checkpoint.worlds import alone, nothing
from tests.report.made import STEP, accuracy, attempt, grid, make_run, step

ONE = [attempt(1, 0, 100.0), step(1), accuracy(1, 0.5)]


def test_runs_are_found_at_any_depth_and_once(tmp_path: Path) -> None:
    grid(tmp_path / "a" / "b")
    make_run(tmp_path / "c", [], ONE)
    # Other folders of a run are no runs.
    saved = tmp_path / "c" / "checkpoints" / "step-00000001"
    saved.mkdir(parents=True)
    (saved / "config.yaml").write_text("run: {}")
    found, unreadable = find_runs([tmp_path, tmp_path / "a", tmp_path / "c"])
    names = ["n1-0", "n1-1", "n2-0", "n2-1", "c"]
    assert [run.folder.name for run in found] == names and not unreadable
    assert [run.config.sleep.passes for run in found] == [1, 1, 2, 2, 1]


def test_runs_inside_a_run_are_found(tmp_path: Path) -> None:
    """A job that has the name of the folder of a later sweep."""
    grid(make_run(tmp_path / "one", [], ONE))
    for kept in ("checkpoints/step-00000001", "wandb/run-1/files", "report"):
        (tmp_path / "one" / kept).mkdir(parents=True)
        (tmp_path / "one" / kept / "config.yaml").write_text("run: {}")
    runs, unreadable = find_runs([tmp_path / "one"])
    assert [run.folder.name for run in runs] == ["one", "n1-0", "n1-1", "n2-0", "n2-1"] and not unreadable


def test_links_to_a_folder_in_itself_end(tmp_path: Path) -> None:
    make_run(tmp_path / "r", [], ONE)
    for name in "ab":
        (tmp_path / name).symlink_to(".")
    assert [run.config.run.name for run in find_runs([tmp_path])[0]] == ["r"]


def test_runs_that_cannot_be_read_do_not_hide_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "good", [], ONE)
    (make_run(tmp_path / "damaged", [], ONE) / "config.yaml").write_text("sleepy: {naps: 3}")
    (make_run(tmp_path / "lost", [], ONE) / "metrics.jsonl").unlink()
    (tmp_path / "closed").mkdir()
    listed = Path.iterdir

    def iterdir(path: Path) -> Iterator[Path]:
        if path.name == "closed":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    runs, unreadable = find_runs([tmp_path, tmp_path / "closed"])
    assert [run.folder.name for run in runs] == ["good"]
    words = (
        "closed cannot be read: Permission denied",
        "damaged/config.yaml",
        "lost is the folder of a run that has no",
    )
    assert len(unreadable) == 3 and all(a in b for a, b in zip(words, unreadable, strict=True)), unreadable
    with pytest.raises(DataError, match="closed cannot be read: Permission denied"):
        find_runs([tmp_path / "closed"])


@pytest.mark.parametrize(
    ("state", "status", "words"),
    [
        ("finished", {}, ["finished"]),
        ("failed", {"reason": "a shard is damaged"}, ["FAILED", "step 5", "50%", "a shard is damaged"]),
        ("stopped", {"reason": "SIGTERM"}, ["STOPPED", "step 5", "SIGTERM"]),
        ("running", {"progress_at": 0.0}, ["NOT FINISHED", "killed", "step 5", "1970-01-01"]),
        (None, {}, ["NOT KNOWN", "status.json", "step 5"]),
    ],
)
def test_an_unfinished_run_is_reported(tmp_path: Path, state: str | None, status: dict, words: list[str]) -> None:
    [run], _ = find_runs([make_run(tmp_path / "r", [], [step(5)], state, **status)])
    assert run.finished == (state == "finished")
    assert all(word in run.state for word in words), run.state


def test_a_damaged_status_is_reported(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", [], [step(5)])
    (folder / "status.json").write_text('{"state": "asleep"}')
    [run], _ = find_runs([folder])
    assert "NOT KNOWN (status.json cannot be read), at step 5" in run.state and not run.finished


def test_wall_time_is_that_of_the_attempts(tmp_path: Path) -> None:
    later = [record | {"time": record["time"] + 1000} for record in (step(3), step(5))]
    records = [attempt(1, 0, 100.0, "v1"), step(1), step(2), attempt(2, 2, 1050.0, "v2"), *later]
    [run], _ = find_runs([make_run(tmp_path / "r", [], records)])
    assert run.records.seconds == 2.0 + 55.0  # until step 2 (102), and from 1050 to step 5 (1105)
    assert run.code == ["v1", "v2"] and run.records.furthest == (5, 5 * STEP)
    [bare], _ = find_runs([make_run(tmp_path / "bare", [], [step(1)])])
    assert bare.records.seconds is None


def test_a_truncated_line_is_skipped_and_reported(tmp_path: Path) -> None:
    path = make_run(tmp_path / "r", [], ONE) / "metrics.jsonl"
    complete = path.read_text()
    for content, cut in ((complete, False), (complete[:-1], False), (complete + '{"step": 2, "tok', True), ("", False)):
        path.write_text(content)
        [run], _ = find_runs([tmp_path])
        assert run.records.cut_short == cut and any("cut short" in note for note in run.notes) == cut
        numbers = run.records.num_steps, len(run.records.attempts), len(run.records.evaluations)
        assert numbers == ((1, 1, 1) if content else (0, 0, 0))
    assert any("no evaluation" in note for note in run.notes)


def test_a_damaged_checkpoint_is_reported(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", [], ONE)
    documents = {
        "state.json": b'{"step": 1, "tokens": 0, "shape": null, "versions": {"torch": "2.0"}}',
        "config.yaml": b"",
    }
    for number in (1, 2):
        save = folder / "checkpoints" / f"step-{number:08d}"
        tensors = {"model/a": torch.zeros(3, 2), "model/b": torch.zeros(()), "optim/a": torch.zeros(9)}
        write(save, tensors, documents, alone(), nothing)
    [run], _ = find_runs([tmp_path])
    assert run.parameters == 7
    assert run.versions == {"torch": "2.0"} and not any("damaged" in note for note in run.notes)
    flip(save / "state.json", 0.5)
    [run], _ = find_runs([tmp_path])
    assert run.parameters is None
    assert run.versions == {} and any("step-00000002, is damaged: the checksum of" in note for note in run.notes)


def test_refusals_name_the_file(tmp_path: Path) -> None:
    def refused(*words: str) -> None:
        with pytest.raises(DataError) as caught:
            find_runs([tmp_path])
        assert all(word in str(caught.value) for word in words), caught.value

    refused(str(tmp_path), "no run")
    folder = make_run(tmp_path / "r", [], ONE)
    path = folder / "metrics.jsonl"
    good = path.read_text()
    path.write_text('{"step": 1, \n' + good)
    refused(str(path), "line 1")
    path.unlink()
    refused(str(folder), "no metrics.jsonl")
    path.write_text(good)
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").unlink()
    refused(str(folder), "no config.yaml")
    (folder / "config.yaml").write_text("sleepy: {naps: 3}\n" + config)
    refused(str(folder / "config.yaml"), "version")
    with pytest.raises(DataError, match="absent is no folder"):
        find_runs([tmp_path / "absent"])


@pytest.mark.parametrize(
    ("record", "missing"),
    [
        ({"step": 1, "tokens": 8, "loss": 1.0, "time": 0.0}, "passes, window, batch"),
        ({"step": 1, "loss": 1.0, "passes": 1, "window": 2, "batch": 1}, "tokens, time"),
        ({"step": 1, "tokens": 8, "time": 0.0, "eval": {"loss": 2.0}}, "eval.loss by passes"),
        ({"step": 1, "tokens": 8, "time": 0.0, "eval": {"loss": {"N4": [2.0]}}}, "eval.loss by passes"),
        ({"step": 1, "tokens": 8, "time": 0.0, "eval": {"loss": {}}}, "eval.loss by passes"),
        ({"step": 1, "tokens": 8, "time": 0.0, "norms": {"S": {"layer1": 1.0}}}, "norms.features and norms.S"),
        ({"step": 1, "tokens": 8, "time": 0.0, "attempt": {"number": 1}}, "attempt.code"),
    ],
)
def test_records_of_an_older_format_are_refused(tmp_path: Path, record: dict, missing: str) -> None:
    folder = make_run(tmp_path / "r", [], ONE)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")
    with pytest.raises(DataError, match=f"metrics.jsonl: the record of step 1 has no {missing}.*older format"):
        find_runs([tmp_path])


def test_recorded_flops_are_taken_and_others_counted(tmp_path: Path) -> None:
    counted = make_run(tmp_path / "counted", [], ONE)
    recorded = make_run(tmp_path / "recorded", [], [record | {"flops": 7 * record["step"]} for record in ONE])
    by_count, as_recorded = find_runs([counted, recorded])[0]
    assert as_recorded.flops == {0: 0, 1: 7} and as_recorded.flops_until(1) == 7
    assert (by_count.flops_until(1) or 0) > 7
