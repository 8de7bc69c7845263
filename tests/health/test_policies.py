"""Bad steps under each policy: one batch of a run makes loss and gradient grow."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sleeptrain.checkpoint.folder import checkpoints
from sleeptrain.config.compose import compose
from sleeptrain.errors import ConfigError, NonFiniteError, SpikeError
from sleeptrain.sleep.curriculum import StepShape
from sleeptrain.train import run_state as run_module
from sleeptrain.train import trainer
from sleeptrain.train.run_state import Run
from tests.checkpoint.contents import contents
from tests.checkpoint.test_folder import flip
from tests.parallel.processes import run_ranks
from tests.parallel.test_train import layout
from tests.runs import on_open
from tests.train.conftest import tiny_shards
from tests.train.test_trainer import records, settings

__all__ = ["tiny_shards"]  # this module uses the fixture, too

BAD, GOOD = 14, 6  # the bad batch, and the step whose checkpoint is far enough before it
STEPS = 20
GUARD = ("health.spike_factor=25", "health.spike_window=8", f"train.tokens={STEPS * 8 * 7}", "checkpoint.keep=1")


def prepared(folder: Path, *more: str) -> Any:
    return compose(settings(folder, *GUARD, "train.eval_every=0", *more))


@pytest.fixture
def bad(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes batches bad in the first replica: multiplies the features that the head reads."""

    def make(factor: float, batches: tuple[int, ...] = (BAD,)) -> None:
        next_batch = Run.next_batch

        def read(self: Run, shape: StepShape) -> Any:
            batch = next_batch(self, shape)
            number = self.source.state_dict()["position"] // 8
            self.is_bad = number in batches and self.world.part.rank == 0  # type: ignore[attr-defined]
            return batch

        def multiply(run: Run) -> None:
            run.is_bad = False  # type: ignore[attr-defined]
            if run.model.norm is not None:
                run.model.norm.register_forward_hook(lambda m, i, x: x * (factor if run.is_bad else 1.0))  # type: ignore[attr-defined]

        monkeypatch.setattr(Run, "next_batch", read)
        on_open(monkeypatch, multiply)

    return make


def steps(folder: Path) -> list[int]:
    return [int(str(r["step"])) for r in records(folder) if "loss" in r]


def last(folder: Path) -> dict[str, Any]:
    return [r for r in records(folder) if "loss" in r][-1]


def saved(folder: Path) -> dict[str, Any]:
    return contents(checkpoints(folder / "r" / "checkpoints")[-1])


def assert_same_end(a: Path, b: Path) -> None:
    one, other = saved(a), saved(b)
    for part in ("model", "optim"):
        first, second = leaves(one[part]), leaves(other[part])
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in second), part
    assert (one["step"], one["tokens"], one["data"]) == (other["step"], other["tokens"], other["data"])


def leaves(tree: Any, path: str = "") -> dict[str, torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return {path: tree}
    return {name: leaf for key, value in tree.items() for name, leaf in leaves(value, f"{path}/{key}").items()}


@pytest.mark.slow
def test_without_the_guard_a_spike_is_trained_on(tmp_path: Path, bad: Callable[..., None]) -> None:
    bad(100.0)
    assert trainer.train(prepared(tmp_path, "health.spike_factor=0")) == 0
    assert steps(tmp_path) == list(range(1, STEPS + 1)) and last(tmp_path)["skipped"] == 0


def test_stop(tmp_path: Path, bad: Callable[..., None]) -> None:
    bad(100.0)
    with pytest.raises(SpikeError, match=r"step 14: (loss|gradient norm) .* above .*health.on_spike=skip"):
        trainer.train(prepared(tmp_path))
    assert steps(tmp_path)[-1] == BAD - 1 and saved(tmp_path)["step"] == 12


def test_skip_makes_no_update_and_empties_the_memory(
    tmp_path: Path, bad: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad(100.0)
    holds_memory, advance = list[bool](), Run.advance

    def seen(self: Run, batch: Any, num_tokens: int, flops: int, state: Any) -> None:
        holds_memory.append(any(layer is not None for layer in state.layers))
        advance(self, batch, num_tokens, flops, state)

    monkeypatch.setattr(Run, "advance", seen)
    config = prepared(tmp_path, "health.on_spike=skip", "checkpoint.every=1", "checkpoint.keep=100")
    assert trainer.train(config) == 0
    assert holds_memory == [step != BAD for step in range(1, STEPS + 1)]
    before, after, later = (contents(checkpoints(tmp_path / "r" / "checkpoints")[s]) for s in (BAD - 1, BAD, BAD + 1))
    for part in ("model", "optim"):
        old, skipped, changed = leaves(before[part]), leaves(after[part]), leaves(later[part])
        assert all(torch.equal(old[name], skipped[name]) for name in old)
        assert not all(torch.equal(old[name], changed[name]) for name in old)
    assert [r["skipped"] for r in records(tmp_path) if "loss" in r] == [0] * 13 + [1] * 7


def train_without(folder: Path, monkeypatch: pytest.MonkeyPatch, bad: int, good: int) -> None:
    """Trains the same run, which skips the batches between `good` and `bad`."""
    next_batch = Run.next_batch

    def jump(self: Run, shape: StepShape) -> Any:
        if self.step == good and self.feed.position()["position"] == good * 8:
            self.feed.discard()
            for _ in range(bad - good):
                self.feed.reading.batch(shape.batch)
            self.carried = None
        return next_batch(self, shape)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "next_batch", jump)
        assert trainer.train(prepared(folder)) == 0


@pytest.mark.parametrize(
    ("factor", "setting", "batch", "good"),
    [
        (100.0, "health.on_spike", BAD, GOOD),
        pytest.param(torch.inf, "health.on_nonfinite", BAD, GOOD, marks=pytest.mark.slow),
        (torch.inf, "health.on_nonfinite", 4, 0),  # the first checkpoint has no optimizer state yet
    ],
)
def test_rollback_is_a_run_without_the_batches_between(
    tmp_path: Path,
    bad: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    factor: float,
    setting: str,
    batch: int,
    good: int,
) -> None:
    train_without(tmp_path / "without", monkeypatch, batch, good)
    bad(factor, (batch,))
    assert trainer.train(prepared(tmp_path / "back", f"{setting}=rollback")) == 0
    assert_same_end(tmp_path / "back", tmp_path / "without")
    assert steps(tmp_path / "back") == list(range(1, STEPS + 1)), "no double step"
    (record,) = [r for r in records(tmp_path / "back") if "rollback" in r]
    assert record["step"] == good and record["rollback"]["number"] == 1 and record["rollback"]["bad_step"] == batch  # type: ignore[index]
    strip = {"rollbacks"}
    rolled_back, without = (
        [{k: v for k, v in r.items() if k not in strip} for r in records(tmp_path / name) if "loss" in r]
        for name in ("back", "without")
    )
    assert rolled_back == without


def test_a_rollback_reports_damaged_checkpoints(
    tmp_path: Path, bad: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad(torch.inf)
    roll_back = Run.roll_back

    def damaged(self: Run, why: str) -> None:
        self.saver.wait()
        flip(self.saver.folder / f"step-{GOOD:08d}" / "state.json", 0.5)
        roll_back(self, why)

    monkeypatch.setattr(Run, "roll_back", damaged)
    assert trainer.train(prepared(tmp_path, "health.on_nonfinite=rollback", "checkpoint.keep=9")) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "is damaged" in line]
    assert "the checksum of state.json" in line and line.endswith("the one before is taken")


class Killed(Exception):
    pass


def kill_at(monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """The process ends at a moment, once."""
    advance, roll_back, removed = Run.advance, Run.roll_back, run_module.remove_after
    if moment.startswith("step"):
        undone, step = (int(part) for part in moment.split()[1:])

        def stops(self: Run, *args: Any) -> None:
            advance(self, *args)
            if (self.rollbacks.total, self.step) == (undone, step):
                raise Killed

        monkeypatch.setattr(Run, "advance", stops)
    elif moment == "after the rollback":

        def back(self: Run, why: str) -> None:
            roll_back(self, why)
            raise Killed

        monkeypatch.setattr(Run, "roll_back", back)
    else:

        def remove(folder: Path, step: int, pointer: Path) -> None:
            if moment == "amid the removal":
                shutil.rmtree(checkpoints(folder)[-1])
                raise Killed
            removed(folder, step, pointer)
            raise Killed

        monkeypatch.setattr(run_module, "remove_after", remove)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("undisturbed")


@pytest.mark.parametrize(
    "moment",
    [
        "step 0 13",
        "amid the removal",
        "after the removal",
        "after the rollback",
        "step 1 8",
        "step 1 10",
    ],
)
@pytest.mark.slow
def test_killed_around_a_rollback_and_restarted_equals_an_uninterrupted_run(
    tmp_path: Path, bad: Callable[..., None], monkeypatch: pytest.MonkeyPatch, uninterrupted: Path, moment: str
) -> None:
    bad(100.0)
    if not checkpoints(uninterrupted / "r" / "checkpoints"):
        assert trainer.train(prepared(uninterrupted, "health.on_spike=rollback")) == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, moment)
        trainer.train(prepared(tmp_path, "health.on_spike=rollback"))
    if moment.startswith("after"):
        assert checkpoints(tmp_path / "r" / "checkpoints")[-1].name == "step-00000006", "newer ones are gone"
    assert trainer.train(prepared(tmp_path, "health.on_spike=rollback")) == 0
    assert records(tmp_path) == records(uninterrupted)
    assert_same_end(tmp_path, uninterrupted)
    assert saved(tmp_path)["spikes"] == saved(uninterrupted)["spikes"]
    assert saved(tmp_path)["rollbacks"] == saved(uninterrupted)["rollbacks"]


def test_rollbacks_without_progress_end_the_run(tmp_path: Path, bad: Callable[..., None]) -> None:
    """Every batch from the fourteenth on is bad: each attempt fails at the first step after the checkpoint."""
    bad(torch.inf, tuple(range(BAD, 100)))
    with pytest.raises(NonFiniteError, match=r"step 7: .*2 rollbacks .* past step 14"):
        trainer.train(prepared(tmp_path, "health.on_nonfinite=rollback", "health.max_rollbacks=2"))
    assert [r["rollback"]["bad_step"] for r in records(tmp_path) if "rollback" in r] == [14, 7]  # type: ignore[index]
    assert steps(tmp_path) == list(range(1, GOOD + 1)) and saved(tmp_path)["step"] == GOOD


def test_progress_allows_more_rollbacks(tmp_path: Path, bad: Callable[..., None]) -> None:
    """The second bad batch comes at step 10 after the first rollback, the third at step 15 after both."""
    bad(torch.inf, (BAD, 18, 32))
    assert trainer.train(prepared(tmp_path, "health.on_nonfinite=rollback", "health.max_rollbacks=2")) == 0
    assert [r["rollback"]["number"] for r in records(tmp_path) if "rollback" in r] == [1, 2, 3]  # type: ignore[index]
    assert steps(tmp_path) == list(range(1, STEPS + 1))


def test_a_run_that_goes_on_may_change_the_policy_but_not_the_limit_of_spikes(
    tmp_path: Path, bad: Callable[..., None]
) -> None:
    bad(100.0)
    with pytest.raises(SpikeError):
        trainer.train(prepared(tmp_path))
    with pytest.raises(ConfigError, match=r"health\.spike_factor"):
        trainer.train(prepared(tmp_path, "health.spike_factor=50"))
    assert trainer.train(prepared(tmp_path, "health.on_spike=skip")) == 0
    assert last(tmp_path)["skipped"] == 1


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize(
    ("spread", "ranks", "policy", "batch", "good"),
    [
        (layout(1, 2, 1), 4, "rollback", BAD, 6),
        pytest.param(layout(1, 1, 3), 2, "rollback", BAD, 6, marks=pytest.mark.slow),
        (layout(1, 1, 1), 2, "rollback", 4, 0),
        pytest.param(layout(1, 1, 0), 2, "skip", BAD, 6, marks=pytest.mark.slow),
        (layout(1, 1, 2), 2, "skip", BAD, 6),
    ],
    ids=str,
)
@pytest.mark.slow
def test_all_processes_act_alike(
    tmp_path: Path, bad: Callable[..., None], spread: tuple[str, ...], ranks: int, policy: str, batch: int, good: int
) -> None:
    """The rows of one replica are bad. The loss and the norm of all ranks show it to the others."""
    bad(100.0 if batch == BAD else torch.inf, (batch,))
    rest = (f"health.on_spike={policy}", "health.on_nonfinite=rollback", "checkpoint.every=1", "checkpoint.keep=100")
    config = prepared(tmp_path, *spread, *rest)
    assert run_ranks(trainer.train, ranks, config) == [0] * ranks
    assert steps(tmp_path) == list(range(1, STEPS + 1))
    folder = checkpoints(tmp_path / "r" / "checkpoints")
    if policy == "skip":
        before, after = contents(folder[BAD - 1]), contents(folder[BAD])
        for part in ("model", "optim"):
            one, other = leaves(before[part]), leaves(after[part])
            assert all(torch.equal(one[name], other[name]) for name in one), part
        assert last(tmp_path)["skipped"] == 1
    else:
        (record,) = [r for r in records(tmp_path) if "rollback" in r]
        assert record["step"] == good and saved(tmp_path)["data"]["position"] == 8 * (STEPS + batch - good)
        assert trainer.train(prepared(tmp_path / "one", *rest)) == 0
        for part in ("model", "optim"):
            one, other = leaves(saved(tmp_path)[part]), leaves(saved(tmp_path / "one")[part])
            assert one.keys() == other.keys()
            for name, tensor in other.items():
                torch.testing.assert_close(one[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_text_goes_on_after_the_bad_step_with_empty_memory(
    tmp_path: Path, tiny_shards: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents in lanes go on over steps: memory is carried at step 2 of 12, and after the bad step, too."""
    more = (*tiny_shards, "health.spike_window=8", "health.on_nonfinite=rollback", "checkpoint.every=1")
    next_batch, reads = Run.next_batch, [0]

    def read(self: Run, shape: StepShape) -> Any:
        if self.folder.parent.name == "without" and reads[0] == 2:
            self.feed.discard()
            while reads[0] < 10:
                self.feed.reading.batch(shape.batch)
                reads[0] += 1
            assert self.carried is not None, "the case needs memory that goes on"
            self.carried = None
        reads[0] += 1
        inputs = next_batch(self, shape)
        assert inputs is not None
        if self.folder.parent.name == "back" and reads[0] == 10:
            assert bool(inputs.batch.continues_B.any()), "the case needs a document that goes on after the bad step"
            self.model.norm.weight.data[0] = torch.nan  # type: ignore[union-attr,operator]
        return inputs

    monkeypatch.setattr(Run, "next_batch", read)
    for name in ("without", "back"):
        reads[0] = 0
        assert trainer.train(compose(settings(tmp_path / name, *more, "train.eval_every=0"))) == 0
    assert_same_end(tmp_path / "back", tmp_path / "without")
    assert [r["rollback"]["bad_step"] for r in records(tmp_path / "back") if "rollback" in r] == [10]  # type: ignore[index]
