"""The engine of a single process: its steps, and its tensors in a checkpoint and back."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from sleeptrain.config.compose import compose
from sleeptrain.config.schema import Config
from sleeptrain.data.batch import Batch
from sleeptrain.distributed.mesh import Mesh
from sleeptrain.distributed.world import World
from sleeptrain.model.state import FastWeights, Recurrent
from sleeptrain.parallel import engine as parallel_engine
from sleeptrain.sleep.curriculum import StepShape
from sleeptrain.sleep.graphs.round_graphs import RoundGraphs
from sleeptrain.train import engine as train_engine
from sleeptrain.train.engine import LocalEngine, build_engine
from sleeptrain.watch.progress import Progress
from tests.checkpoint.contents import InMemory
from tests.checkpoint.worlds import alone
from tests.models import VOCABULARY, random_batch
from tests.sleep.graphs.recorder import Recorder

CPU, SHAPE = torch.device("cpu"), StepShape(2, 4, 2)


@pytest.fixture(scope="module")
def config() -> Config:
    layers = "model.layers=[gated_deltanet,attention]"
    small = ("model.dim=16", "model.ffn_dim=16", f"model.vocab_size={VOCABULARY}", layers)
    return compose(["experiment=rule110", "sleep.curriculum=[]", *small, "optim.clip_norm=1"])


def made(config: Config) -> LocalEngine:
    return LocalEngine(config, CPU, Progress())


def batch(seed: int = 0) -> Batch:
    return random_batch([[0] * 8, [0] * 8], seed=seed)


def stepped(config: Config, steps: int = 1) -> LocalEngine:
    engine = made(config)
    for seed in range(steps):
        engine.forward_backward(batch(seed), SHAPE, None)
        engine.step(1.0)
    return engine


def weights(engine: LocalEngine) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in engine.model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_steps_as_cuda_graphs_make_the_same_updates(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, where what is recorded is run again."""
    config = replace(config, sleep=replace(config.sleep, recompute="none"))
    expected, recorder = stepped(config, 4), Recorder()
    monkeypatch.setattr(train_engine, "round_graphs", lambda _, model: RoundGraphs(model, recorder))
    found = stepped(config, 4)
    assert recorder.replays > recorder.recorded > 0
    assert found.graphs is not None and "rounds recorded" in (found.graphs.take() or "")
    for name, weight in weights(expected).items():
        torch.testing.assert_close(weights(found)[name], weight, rtol=1e-4, atol=1e-5)


def test_the_initial_weights_are_those_of_the_seed(config: Config) -> None:
    torch.manual_seed(1)
    one = made(config)
    torch.manual_seed(2)
    assert same(weights(one), weights(made(config)))


def test_a_step_clips_updates_and_returns_the_norm_before_clipping(config: Config) -> None:
    engine = made(config)
    before, norms_seen = weights(engine), list[float]()
    engine.forward_backward(batch(), SHAPE, None)
    for parameter in engine.model.parameters():
        assert parameter.grad is not None
        parameter.grad.mul_(1000)
    norm = engine.step(1.0, lambda norm: norms_seen.append(norm) is None)
    assert norms_seen == [norm] and norm > 1 and not same(weights(engine), before)
    clipped = torch.stack([p.grad.norm() for p in engine.model.parameters() if p.grad is not None]).norm()
    assert float(clipped) == pytest.approx(1.0, rel=1e-4)


def test_a_norm_that_is_refused_or_not_finite_changes_nothing(config: Config) -> None:
    engine = made(config)
    before = weights(engine)
    engine.forward_backward(batch(), SHAPE, None)
    engine.step(1.0, lambda norm: False)
    assert same(weights(engine), before)
    first = next(engine.model.parameters())
    assert first.grad is not None
    first.grad[:] = math.nan
    assert math.isnan(engine.step(1.0, lambda norm: pytest.fail("a norm that is not finite is not asked about")))
    assert same(weights(engine), before)


def test_gradients_of_the_step_before_are_dropped(config: Config) -> None:
    engine = made(config)
    engine.forward_backward(batch(), SHAPE, None)
    once = [p.grad.clone() for p in engine.model.parameters() if p.grad is not None]
    engine.forward_backward(batch(), SHAPE, None)
    again = [p.grad for p in engine.model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_an_engine_that_loads_goes_on_as_the_one_that_saved(config: Config) -> None:
    engine, other = stepped(config, 2), made(config)
    carried = FastWeights((Recurrent(torch.ones(2, 1, 3, 4)), None))
    found = other.load(InMemory(dict(engine.local_tensors(carried))))
    assert found is not None and same(found.to_state_dict(), carried.to_state_dict())
    for each in (engine, other):
        each.forward_backward(batch(5), SHAPE, None)
        each.step(1.0)
    assert same(engine.local_tensors(None), other.local_tensors(None))


def test_a_checkpoint_of_weights_alone_carries_nothing(config: Config) -> None:
    engine = stepped(config)
    saved = {name: t for name, t in engine.local_tensors(None).items() if name.startswith("model/")}
    other = made(config)
    assert other.load(InMemory(saved)) is None
    assert same(weights(other), weights(engine))


def test_weights_that_the_checkpoint_lacks_keep_their_values(config: Config) -> None:
    engine = made(config)
    before = weights(engine)
    engine.load_weights(InMemory({"model/norm.weight": torch.full((16,), 3.0), "optim/x": torch.zeros(1)}))
    after = weights(engine)
    assert after.pop("norm.weight").tolist() == [3.0] * 16
    del before["norm.weight"]
    assert same(after, before)


def test_one_process_needs_no_other_engine(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    made_with: list[Any] = []
    monkeypatch.setattr(parallel_engine, "DistributedEngine", lambda *arguments: made_with.append(arguments))
    progress, several = Progress(), World(Mesh.single(), CPU, size=2)
    assert isinstance(build_engine(config, alone(), progress), LocalEngine) and made_with == []
    build_engine(config, several, progress)
    assert made_with == [(config, several, progress)]
