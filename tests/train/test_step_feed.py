"""The inputs of steps: read and planned ahead, agreed on in one exchange a step, given back where they are not used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sleeptrain.config.compose import compose
from sleeptrain.distributed.world import World
from sleeptrain.errors import DataError
from sleeptrain.train import trainer
from sleeptrain.train.run_state import Run
from tests.runs import on_open
from tests.train.opened import SHAPE, make_steps, open_in
from tests.train.test_trainer import settings

STEPS = 4
TRAINED = (f"train.tokens={STEPS * 8 * 7}", "train.eval_every=0")


def test_a_step_is_one_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exchanges, in_steps = [0], list[int]()
    sum_and_max, one_step = World.sum_and_max, trainer.one_step

    def counted(self: World, *numbers: Any) -> Any:
        exchanges[0] += 1
        return sum_and_max(self, *numbers)

    def step(run: Run, pace: Any) -> bool:
        exchanges[0] = 0
        done = one_step(run, pace)
        if not run.done:  # the last step evaluates
            in_steps.append(exchanges[0])
        return done

    monkeypatch.setattr(World, "sum_and_max", counted)
    monkeypatch.setattr(trainer, "one_step", step)
    assert trainer.train(compose(settings(tmp_path, *TRAINED, "health.spike_factor=9"))) == 0
    assert in_steps == [2, 1, 1], "the first step also exchanges its own totals"


def test_what_is_read_ahead_is_given_back_and_not_saved(tmp_path: Path) -> None:
    with open_in(tmp_path) as run:
        make_steps(run, 1)
        before, report = run.source.state_dict(), run.source.report()
        run.feed.read(SHAPE)
        assert run.source.state_dict() != before
        assert run.feed.position() == before == run._state()["data"] and run.feed.report() == report
        ahead = run.feed.take(SHAPE)
        run.source.load_state_dict(before)
        again = run.feed.take(SHAPE)
        assert ahead is not None and again is not None
        assert ahead.batch.tokens_BT.equal(again.batch.tokens_BT) and ahead.plans == again.plans
        run.feed.read(SHAPE)
        run.feed.discard()
        assert run.source.state_dict() == run.feed.position() != before


def test_a_failed_reading_fails_the_step_that_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(run: Run) -> None:
        read = run.feed.reading.batch

        def batch(rows: int) -> object:
            if run.source.state_dict()["position"] == 2 * 8:
                raise DataError("no third batch")
            return read(rows)

        monkeypatch.setattr(run.feed.reading, "batch", batch)
        runs.append(run)

    runs: list[Run] = []
    on_open(monkeypatch, broken)
    with pytest.raises(DataError, match="no third batch"):
        trainer.train(compose(settings(tmp_path, *TRAINED)))
    assert runs[0].step == 2


def test_an_error_of_the_thread_that_plans_reaches_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_in(tmp_path) as run:

        def broken(*_: object) -> None:
            raise ValueError("no plan") from KeyError("a cause")

        monkeypatch.setattr(run.engine, "plan", broken)
        run.feed.read(SHAPE)
        with pytest.raises(ValueError, match="no plan") as raised:
            run.feed.take(SHAPE)
        assert isinstance(raised.value.__cause__, KeyError)
        assert raised.traceback[-1].name == "broken"
