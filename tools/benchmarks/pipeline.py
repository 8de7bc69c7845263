"""A step on two processes of one core each against one process on one core: pipeline, replicas, tensor shards.

All have one model and one batch, and run forward and backward of all windows and passes. Rounds are recomputed in the
backward on both sides, as a pipeline always does. The number is the wall time of the whole step, with the sum of
gradients at its end; the least of several steps. The pipeline's idle share is compared with the simulation of the
schedule for stages of equal cost.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks import Row
from sleeptrain.config.schema import AttentionConfig, GatedDeltaNetConfig, ModelConfig
from sleeptrain.data.batch import Batch
from sleeptrain.distributed.mesh import Mesh
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.parallel.build import build_model
from sleeptrain.parallel.pipeline.executor import StageStep
from sleeptrain.parallel.pipeline.mailbox import Mailbox
from sleeptrain.parallel.pipeline.micro_batch import StageMicroBatch
from sleeptrain.parallel.pipeline.schedule import Schedule, schedule
from sleeptrain.parallel.pipeline.simulate import simulate
from sleeptrain.parallel.pipeline.stages import PipelineStages
from sleeptrain.sleep.loop import LoopSettings, run_rounds
from sleeptrain.sleep.recompute import Recompute
from sleeptrain.sleep.rounds import Round, plan_rounds, window_facts

METHOD = "one thread a process; wall time of a step; the least of several"
LAYERS = ["gated_deltanet", "attention"] * 4
WINDOW, WINDOWS, PASSES = 128, 4, 2
MICRO_BATCHES, ROWS = 4, 2  # micro-batches, rows of each
PROCESSES = 2
GOALS = {"pipeline": 1.7, "data": 1.8, "tensor": None}
MODEL = ModelConfig(
    vocab_size=512,
    dim=256,
    ffn_dim=768,
    layers=LAYERS,
    attention=AttentionConfig(4, 2, 64),
    gated_deltanet=GatedDeltaNetConfig(4, 4, 64, 64),
)


def run(quick: bool) -> list[Row]:
    steps = 2 if quick else 6
    torch.set_num_threads(1)
    alone = _least(_one_process(), steps)
    rows = [Row("one process", _tokens() / alone, "tokens/s")]
    for layout, goal in GOALS.items():
        seconds = _spread(layout, steps)
        rows.append(Row(f"{layout}: two processes against one", alone / seconds, "x", goal))
        if layout == "pipeline":
            # Time of both cores against the time of one process, which never waits.
            rows.append(
                Row("pipeline: idle share, messages included", 100 * (2 * seconds / alone - 1), "%", better="lower")
            )
            rows.append(Row("pipeline: idle share, simulated", 100 * simulate(_schedule()).bubble, "%", better="lower"))
    return rows


def _tokens() -> int:
    return MICRO_BATCHES * ROWS * WINDOWS * WINDOW


def _batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(MODEL.vocab_size, (ROWS, WINDOWS * WINDOW + 1), generator=generator)
    one = torch.ones(ROWS, dtype=torch.bool)
    documents = torch.zeros(ROWS, WINDOWS * WINDOW, dtype=torch.long)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), documents, ~one, one)


def _plan(batch: Batch) -> list[Round]:
    return plan_rounds(window_facts(batch, WINDOW), PASSES)


def _settings(recompute: str) -> LoopSettings:
    return LoopSettings((0, len(LAYERS)), recompute=Recompute(recompute))


def _schedule() -> Schedule:
    half = len(LAYERS) // PROCESSES
    stages = PipelineStages((0, half, len(LAYERS)), tuple(LAYERS), (0, len(LAYERS)))
    return schedule([_plan(_batch(seed)) for seed in range(MICRO_BATCHES)], stages)


def _sequential(model: Hybrid, batches: list[Batch]) -> Callable[[], None]:
    """A step of one process: forward and backward of one batch after another."""
    settings = _settings("pass")

    def step() -> None:
        model.zero_grad()
        for batch in batches:
            losses, _ = run_rounds(model, batch, _plan(batch), model.empty_state(), settings)
            (torch.stack(list(losses.values())).sum() / _tokens()).backward()

    return step


def _one_process() -> Callable[[], None]:
    model = Hybrid(MODEL)
    model.init_weights(0)
    return _sequential(model, [_batch(seed) for seed in range(MICRO_BATCHES)])


def _least(step: Callable[[], None], steps: int) -> float:
    """Wall time of the fastest step, in seconds, after one step of warm-up."""
    seconds = []
    for _ in range(steps + 1):
        if dist.is_initialized():
            dist.barrier()
        start = time.perf_counter()
        step()
        if dist.is_initialized():
            dist.barrier()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _spread(layout: str, steps: int) -> float:
    """Wall time of a step on two processes, in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (layout, steps, folder), nprocs=PROCESSES)
        return float((Path(folder) / "seconds").read_text())


def _rank(rank: int, layout: str, steps: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    seconds = _least({"pipeline": _staged, "data": _replicated, "tensor": _sharded}[layout](), steps)
    if rank == 0:
        (Path(folder) / "seconds").write_text(str(seconds))
    dist.barrier()
    dist.destroy_process_group()


def _staged() -> Callable[[], None]:
    mesh, plan = Mesh.build(1, PROCESSES), _schedule()
    rank = mesh.pipeline.rank
    assert mesh.pipeline.group is not None
    model = build_model(MODEL, mesh, range(*plan.stages.bounds[rank : rank + 2]))
    model.init_weights(0)
    mailbox = Mailbox(mesh.pipeline.group, torch.float32, torch.device("cpu"))
    batches = [_batch(seed) for seed in range(MICRO_BATCHES)]

    def step() -> None:
        model.zero_grad()
        micro_batches = [
            StageMicroBatch(model, batch, rounds, model.empty_state(), _settings("none"), _tokens())
            for batch, rounds in zip(batches, plan.plans, strict=True)
        ]
        StageStep(plan, rank, micro_batches, mailbox, MODEL.dim).run(lambda surrogate: surrogate.backward())

    return step


def _replicated() -> Callable[[], None]:
    mesh = Mesh.build(1, 1)
    model = build_model(MODEL, mesh)
    model.init_weights(0)
    seeds = range(mesh.data.rank, MICRO_BATCHES, PROCESSES)
    train = _sequential(model, [_batch(seed) for seed in seeds])

    def step() -> None:
        train()
        flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        dist.all_reduce(flat, group=mesh.data.group)

    return step


def _sharded() -> Callable[[], None]:
    model = build_model(MODEL, Mesh.build(PROCESSES, 1))
    model.init_weights(0)
    return _sequential(model, [_batch(seed) for seed in range(MICRO_BATCHES)])
