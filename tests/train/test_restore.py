"""A checkpoint that is read back: weights and optimizer state into the engine, and the state of the run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sleeptrain.checkpoint.folder import checkpoints, read_state
from sleeptrain.config.schema import Config
from sleeptrain.errors import DataError
from sleeptrain.health.rollbacks import Rollbacks
from sleeptrain.train import restore as restore_module
from sleeptrain.train.engine import LocalEngine
from sleeptrain.train.restore import Restored, restore
from sleeptrain.watch.progress import Progress
from tests.checkpoint.worlds import alone
from tests.configs import change
from tests.train.opened import SHAPE, make_steps, open_in


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    """The checkpoint of a run after a step, in which all counts differ, and the run's configuration."""
    with open_in(tmp_path_factory.mktemp("saved")) as run:
        make_steps(run, 1)
        run.skipped, run.owes_evaluation, run.rollbacks = 3, True, Rollbacks(1, 2, 3, 4, 5)
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter.add_(0.5)
        torch.manual_seed(7)
        run.save()
        run.finish_saving()
        return checkpoints(run.folder / "checkpoints")[-1], run.config


def test_the_state_of_the_run_comes_back(saved: tuple[Path, Config]) -> None:
    path, config = saved
    engine = LocalEngine(config, torch.device("cpu"), Progress())
    before = [p.detach() + 0.5 for p in engine.model.parameters()]
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(8)
    found = restore(path, engine, config.model, alone())
    assert torch.equal(torch.rand(3), expected), "the generator goes on where it was"
    assert all(torch.equal(p, w) for p, w in zip(engine.model.parameters(), before, strict=True))
    assert (found.checkpoint, found.step, found.samples, found.skipped) == (path, 1, 8, 3)
    assert found.flops == 100
    assert found.tokens > 0 and found.shape == SHAPE and found.carried is None
    assert found.owes_evaluation and found.rollbacks == Rollbacks(1, 2, 3, 4, 5)
    assert found.data["position"] == 8 and found.wandb_id is None and found.spikes is not None


def test_a_checkpoint_without_flops_is_restored(saved: tuple[Path, Config], monkeypatch: pytest.MonkeyPatch) -> None:
    path, config = saved
    state = {name: value for name, value in read_state(path).items() if name != "flops"}
    monkeypatch.setattr(restore_module, "read_state", lambda *_: state)
    found = restore(path, LocalEngine(config, torch.device("cpu"), Progress()), config.model, alone())
    assert found.step == 1 and found.flops is None


def test_a_model_of_another_size_is_refused(saved: tuple[Path, Config]) -> None:
    path, config = saved
    layers = {"layers": ["attention", "gated_deltanet", "gated_deltanet"]}
    engine = LocalEngine(config, torch.device("cpu"), Progress())
    with pytest.raises(DataError, match=r"does not fit the model: .*missing"):
        restore(path, engine, change(type(config.model)(**vars(config.model)), layers), alone())


def test_a_new_run_begins_with_zeros() -> None:
    new = Restored()
    assert (new.checkpoint, new.step, new.tokens, new.shape, new.carried) == (None, 0, 0, None, None)
    assert new.rollbacks == Rollbacks() and not new.owes_evaluation
    assert Restored().rollbacks is not new.rollbacks
