"""Opening a run: anew, from its checkpoint, with changed settings, or not at all."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from sleeptrain.checkpoint.folder import checkpoints
from sleeptrain.config import load_resolved
from sleeptrain.errors import ConfigError
from sleeptrain.stop import StopRequest
from sleeptrain.train.logging.metrics import read_metrics
from sleeptrain.train.status import read_status
from tests.test_lease import write_lease
from tests.train.opened import make_steps, open_in, opened


def attempts(folder: Path) -> list[tuple[int, int]]:
    found = [record for record in read_metrics(folder / "r" / "metrics.jsonl") if "attempt" in record]
    return [(record["attempt"]["number"], record["step"]) for record in found]


def test_a_new_run_has_its_settings_a_record_and_a_checkpoint_before_the_first_step(tmp_path: Path) -> None:
    with open_in(tmp_path) as run:
        assert (run.step, run.tokens, run.samples, run.carried, run.shape) == (0, 0, 0, None, None)
        assert load_resolved(tmp_path / "r" / "config.yaml") == run.config
        assert run.config.model.vocab_size > 0, "the vocabulary of the data"
        assert [path.name for path in checkpoints(tmp_path / "r" / "checkpoints")] == ["step-00000000"]
        assert attempts(tmp_path) == [(1, 0)]
        status = read_status(tmp_path / "r")
        assert status is not None and (status["state"], status["step"]) == ("running", 0)
        run.lease.check()


def test_it_goes_on_from_its_checkpoint_and_drops_later_records(tmp_path: Path) -> None:
    with open_in(tmp_path) as run:
        make_steps(run, 2)
        run.log({"loss": 1.0})
        run.save()
        run.finish_saving()
        tokens = run.tokens
        make_steps(run, 1)
        run.log({"loss": 2.0})
    with open_in(tmp_path) as run:
        assert (run.step, run.tokens, run.samples) == (2, tokens, 16)
        assert run.source.state_dict()["position"] == 16
        assert attempts(tmp_path) == [(1, 0), (2, 2)]
        assert [r["loss"] for r in read_metrics(tmp_path / "r" / "metrics.jsonl") if "loss" in r] == [1.0]
        assert len(checkpoints(tmp_path / "r" / "checkpoints")) == 2, "it is not saved again"


def test_changed_settings_are_refused_or_reported_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_in(tmp_path):
        pass
    with pytest.raises(ConfigError, match="other settings"), open_in(tmp_path, "optim.muon_lr=0.5"):
        pass
    assert attempts(tmp_path) == [(1, 0)], "a start that is refused is no attempt"
    capsys.readouterr()
    with open_in(tmp_path, "optim.muon_lr=0.5", "run.allow_changes=[optim.muon_lr]"):
        pass
    assert "changed since the attempt before:\n  optim.muon_lr: 0.002 -> 0.5" in capsys.readouterr().err
    [line] = (tmp_path / "r" / "changes.jsonl").read_text().splitlines()
    assert json.loads(line) == {"attempt": 2, "step": 0, "changes": ["optim.muon_lr: 0.002 -> 0.5"]}
    assert load_resolved(tmp_path / "r" / "config.yaml").optim.muon_lr == 0.5


def test_an_evaluation_that_was_made_is_no_longer_owed(tmp_path: Path) -> None:
    with open_in(tmp_path) as run:
        make_steps(run, 1)
        run.owes_evaluation = True
        run.save()
        run.finish_saving()
    with open_in(tmp_path) as run:
        assert run.owes_evaluation
        run.log({"eval": {"loss": {"2": [1.0]}}})
    with open_in(tmp_path) as run:
        assert not run.owes_evaluation


def test_a_run_that_is_to_stop_while_another_has_the_folder_is_not_opened(tmp_path: Path) -> None:
    write_lease(tmp_path / "r")
    request = StopRequest(says=False)
    request.receive(signal.SIGTERM)
    with opened(tmp_path, request=request) as run:
        assert run is None
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["lease.json"]
