"""Settings that the engines of several processes must not lose in DeepSpeed and in a pipeline."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from sleeptrain.config.compose import compose
from sleeptrain.config.schema import Config
from sleeptrain.distributed.launch import join
from sleeptrain.model import compiled
from sleeptrain.parallel import engine as parallel_engine
from sleeptrain.plan.workload import typical_batch
from sleeptrain.sleep.curriculum import stage_shape
from sleeptrain.sleep.graphs.round_graphs import RoundGraphs
from sleeptrain.sleep.loop import loop_settings
from sleeptrain.sleep.precision import Products
from sleeptrain.sleep.rounds import plan_batch
from sleeptrain.sleep.totals import StepFacts, exchange_results
from sleeptrain.train.engine import build_engine
from sleeptrain.watch.progress import Progress
from tests.parallel.layouts import Layout
from tests.parallel.processes import run_ranks
from tests.sleep.graphs.recorder import Recorder

pytestmark = pytest.mark.usefixtures("imported")


def settings(layout: Layout, *more: str) -> Config:
    return compose(
        [
            "experiment=rule110",
            "run.name=r",
            "data.rule110.width=6",
            "data.rule110.steps=2",
            "data.batch=4",
            "train.tokens=1000",
            "train.precision=bf16",
            "train.micro_batch=2",
            "train.device=cpu",
            "sleep.passes=2",
            "model.layers=[gated_deltanet,attention,mamba2,jet]",
            "model.dim=16",
            "model.ffn_dim=16",
            "model.attention.head_dim=8",
            "model.vocab_size=17",
            *layout.settings(),
            *more,
        ]
    )


def products(config: Config) -> dict[str, set[torch.dtype]]:
    """The dtype of one rank's products under the autocast of CUDA, as `torch.is_autocast_enabled()` sees it."""
    enabled = torch.is_autocast_enabled
    torch.is_autocast_enabled = lambda device=None: enabled(device or "cpu")
    world = join(config)
    engine, shape = build_engine(config, world, Progress()), stage_shape(config, 0)
    batch = typical_batch(config, shape.batch // world.mesh.data.size)
    rounds = plan_batch(batch, shape.window, shape.passes, config.sleep)
    held_out = loop_settings(config.sleep, shape.window, engine.model.num_layers, recompute="none")
    found = {}
    for name, call in {
        "training": lambda: engine.forward_backward(batch, shape, None),
        "update": lambda: engine.step(1.0),
        "evaluation": lambda: engine.window_losses(batch, rounds, held_out, None),
        "locating": lambda: engine.locate_nonfinite(batch, shape, None),
    }.items():
        with Products() as seen:
            call()
        found[name] = seen.dtypes
    return found


@pytest.mark.parametrize(
    ("layout", "more"),
    [
        (Layout(1, 1, 2, 1), ("sleep.recompute=pass",)),
        pytest.param(Layout(1, 1, 2, 2), ("sleep.recompute=window",), marks=pytest.mark.slow),
        (Layout(1, 1, 2, 3), ()),
        pytest.param(Layout(2, 1, 1, 1), ("sleep.recompute=block",), marks=pytest.mark.slow),
        (Layout(1, 2, 1, 1), ("sleep.recompute=block",)),
    ],
)
def test_bf16_is_bf16_where_deepspeed_sees_autocast(layout: Layout, more: tuple[str, ...]) -> None:
    for seen in run_ranks(products, layout.size, settings(layout, *more)):
        assert seen["training"] == seen["evaluation"] == seen["locating"] == {torch.bfloat16}
        assert seen["update"] <= {torch.float32}  # Muon's, on a CPU


def gradients(config: Config) -> tuple[float, float, int]:
    """The loss and the norm of the gradients of a step, and the graphs that a second step added."""
    counters.clear()  # of the process that forked this rank
    world = join(config)
    engine, shape = build_engine(config, world, Progress()), stage_shape(config, 0)
    batch = typical_batch(config, shape.batch // world.mesh.data.size)
    part = engine.forward_backward(batch, shape, None)
    loss = exchange_results(world, part, 0.0, StepFacts())[0].loss
    norm, before = engine.step(1.0), counters["stats"]["unique_graphs"]
    engine.forward_backward(batch, shape, None)
    assert config.train.compile == (before > 0)
    return loss, norm, counters["stats"]["unique_graphs"] - before


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(Layout(*sizes), marks=pytest.mark.slow)
        for sizes in [(1, 1, 2, 1), (1, 1, 2, 0), (1, 1, 2, 2), (1, 2, 1, 1)]
    ],
)
def test_compiled_blocks_in_every_layout(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    more = ("train.precision=fp32", "model.layers=[gated_deltanet,attention]")
    eager, found = (
        run_ranks(gradients, layout.size, settings(layout, *more, f"train.compile={on}")) for on in (False, True)
    )
    for (loss, norm, _), (other_loss, other_norm, new) in zip(eager, found, strict=True):
        assert (other_loss, other_norm) == pytest.approx((loss, norm), rel=1e-5)
        assert new == 0


def four_steps(config: Config) -> tuple[list[float], int]:
    """The losses and gradient norms of some steps, and how often recorded functions ran again."""
    recorder, graphs = Recorder(), config.train.cuda_graphs
    parallel_engine.round_graphs = lambda _, model: RoundGraphs(model, recorder) if graphs else None
    world = join(config)
    engine, shape = build_engine(config, world, Progress()), stage_shape(config, 0)
    batch = typical_batch(config, shape.batch // world.mesh.data.size)
    found = []
    for _ in range(4):
        found += [engine.forward_backward(batch, shape, None).loss, engine.step(0.1)]
    return found, recorder.replays


@pytest.mark.slow
def test_replicas_with_cuda_graphs() -> None:
    """On CPUs, where what is recorded is run again: ZeRO-1 has the gradients that it sums at the places it knows."""
    layout = Layout(1, 1, 2, 1)
    plain, graphs = (
        run_ranks(four_steps, layout.size, settings(layout, f"train.cuda_graphs={on}")) for on in (False, True)
    )
    for (expected, none), (found, replays) in zip(plain, graphs, strict=True):
        assert found == pytest.approx(expected, rel=2e-3)  # gradients of bf16 products add up in another order
        assert none == 0 < replays
