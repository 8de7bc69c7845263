"""An open run: its counts, its batches, its checkpoints, and the way back to one of them."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from sleeptrain.checkpoint.folder import checkpoints
from sleeptrain.data.ahead import Cancelled
from sleeptrain.data.batch import Batch
from sleeptrain.errors import HealthError, LeaseError
from sleeptrain.sleep.totals import joined_facts
from sleeptrain.stop import StopRequest
from sleeptrain.train.logging.metrics import read_metrics
from sleeptrain.train.run_state import Run
from tests.train.opened import SHAPE, make_steps, open_in, opened

ROLLBACK = ("health.on_spike=rollback", "health.spike_factor=9", "health.spike_window=8", "train.tokens=10000")


def saved(run: Run) -> list[int]:
    return [int(path.name.split("-")[1]) for path in checkpoints(run.folder / "checkpoints")]


def save(run: Run) -> None:
    run.save()
    run.finish_saving()


def test_steps_are_counted_with_tokens_and_samples(tmp_path: Path) -> None:
    with open_in(tmp_path) as run:
        batch, totals, _ = run.next_batch(SHAPE) or pytest.fail("a batch")
        tokens = totals.tokens
        assert tokens == int((batch.documents_BT >= 0).sum()) > 0
        run.advance(batch, tokens, 100, run.model.empty_state())
        assert (run.step, run.tokens, run.samples, run.flops) == (1, tokens, 8, 100)
        assert run.carried is None, "no row goes on"
        batch.continues_B[:] = True
        state = run.model.empty_state()
        run.advance(batch, tokens, 100, state)
        assert run.carried is state
        assert not run.done
        run.tokens = run.config.train.tokens
        assert run.done and run.finished
        run.owes_evaluation = True
        assert run.done and not run.finished


def test_waiting_that_is_cancelled_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_in(tmp_path) as run:
        make_steps(run, 1)
        read = run.feed.reading.batch

        def cancelled(num_rows: int) -> object:
            read(num_rows)
            raise Cancelled

        monkeypatch.setattr(run.feed.reading, "batch", cancelled)
        before = run.source.state_dict()
        assert run.next_batch(SHAPE) is None
        assert run.source.state_dict() == before


def test_a_step_is_saved_once_with_the_position_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_in(tmp_path) as run:
        make_steps(run, 2)
        run.skipped = 1
        save(run)
        with monkeypatch.context() as patch:
            patch.setattr(run.engine, "local_tensors", lambda carried: pytest.fail("it is saved already"))
            save(run)
        assert saved(run) == [0, 2]
        state = json.loads((checkpoints(run.folder / "checkpoints")[-1] / "state.json").read_text())
        assert (state["step"], state["tokens"], state["samples"], state["skipped"]) == (2, run.tokens, 16, 1)
        assert state["flops"] == 200
        assert state["shape"] == {"passes": 2, "window": 6, "batch": 8}
        assert state["written_by"] == {"tensor": 1, "pipeline": 1, "data": 1, "zero": run.config.parallel.zero}
        assert state["data"]["position"] == 16


def test_records_carry_the_position(tmp_path: Path) -> None:
    with open_in(tmp_path) as run:
        make_steps(run, 1)
        run.log({"loss": 1.5})
        record = read_metrics(run.folder / "metrics.jsonl")[-1]
        assert (record["step"], record["tokens"], record["flops"], record["loss"]) == (1, run.tokens, 100, 1.5)


def test_flops_that_were_not_counted_from_the_beginning_are_not_recorded(tmp_path: Path) -> None:
    with open_in(tmp_path) as run:
        run.flops = None  # as from a checkpoint without FLOPs
        make_steps(run, 1)
        run.log({"loss": 1.5})
        save(run)
        assert "flops" not in read_metrics(run.folder / "metrics.jsonl")[-1]
        assert json.loads((checkpoints(run.folder / "checkpoints")[-1] / "state.json").read_text())["flops"] is None


def test_a_rollback_goes_back_to_a_good_checkpoint_and_on_with_later_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_in(tmp_path, *ROLLBACK) as run:
        weights = [p.detach().clone() for p in run.model.parameters()]
        for count in (2, 8):
            make_steps(run, count)
            run.log({"loss": float(run.step)})
            save(run)
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter.add_(1)
        run.carried = run.model.empty_state()
        run.roll_back("step 11: loss 9")
        assert run.flops == 200
        assert run.step == 2, "the newest that lies 8 steps before the bad one"
        assert all(torch.equal(p, w) for p, w in zip(run.model.parameters(), weights, strict=True))
        assert run.carried is None and run.source.state_dict()["position"] == 80, "data goes on"
        assert saved(run)[-1] == 2, "what came after it is gone"
        assert (run.rollbacks.total, run.rollbacks.undone, run.rollbacks.in_vain) == (1, 8, 1)
        records = read_metrics(run.folder / "metrics.jsonl")
        assert [r["loss"] for r in records if "loss" in r] == [2.0]
        assert records[-1]["rollback"] == {"number": 1, "bad_step": 11, "why": "step 11: loss 9"}
        assert "rollback 1: step 11: loss 9; going on from step 2 with later data" in capsys.readouterr().err


def test_without_a_good_checkpoint_the_message_names_a_way_out(tmp_path: Path) -> None:
    with open_in(tmp_path, *ROLLBACK) as run:
        make_steps(run, 9)
        for path in checkpoints(run.folder / "checkpoints"):
            path.rename(path.with_name("step-00000009"))
        with pytest.raises(HealthError, match=r"loss 9\. There is no checkpoint of step 2 or before.*on_spike=skip"):
            run.roll_back("step 10: loss 9")


def test_a_run_that_was_taken_over_records_nothing_more(tmp_path: Path) -> None:
    with open_in(tmp_path) as run:
        run.lease.path.write_text("{}")
        with pytest.raises(LeaseError):
            run.lease.check()
        before = (run.folder / "metrics.jsonl").read_bytes()
        for write in (lambda: run.log({"loss": 1.0}), lambda: make_steps(run, 1)):
            with pytest.raises(LeaseError):
                write()
        assert (run.folder / "metrics.jsonl").read_bytes() == before


def test_a_request_stops_before_the_next_step_whose_batch_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = StopRequest(says=False)
    with opened(tmp_path, request=request) as run:
        assert run is not None
        read = run.feed.reading.batch

        def interrupted(num_rows: int) -> Batch:
            request.receive(signal.SIGTERM)
            return read(num_rows)

        monkeypatch.setattr(run.feed.reading, "batch", interrupted)
        before = run.source.state_dict()
        assert run.next_batch(SHAPE) is None and run.stopping.reason == "SIGTERM"
        assert run.source.state_dict() == before


def test_a_request_while_a_step_runs_is_heard_in_its_exchange(tmp_path: Path) -> None:
    request = StopRequest(says=False)
    with opened(tmp_path, request=request) as run:
        assert run is not None
        make_steps(run, 1)
        before = run.source.state_dict()
        run.read_ahead(1)
        request.receive(signal.SIGTERM)
        facts = run.feed.facts()
        assert run.stopping.reason is None
        run.feed.agree_on(joined_facts(run.world, facts.sums, facts.largest))
        assert run.stopping.reason == "SIGTERM" and run.source.state_dict() == before == run.feed.position()


def test_waiting_that_a_request_cancels_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = StopRequest(says=False)
    with opened(tmp_path, request=request) as run:
        assert run is not None

        def cancelled(num_rows: int) -> Batch:
            request.receive(signal.SIGUSR1)
            raise Cancelled

        monkeypatch.setattr(run.feed.reading, "batch", cancelled)
        assert run.next_batch(SHAPE) is None and run.stopping.reason == "SIGUSR1"
