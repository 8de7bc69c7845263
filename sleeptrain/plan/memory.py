"""The memory of the fullest process of each pipeline stage, by kind, in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from sleeptrain.config.schema import Config
from sleeptrain.parallel.pipeline.schedule import Schedule
from sleeptrain.parallel.tensor.sharding import local_config
from sleeptrain.plan.activations import Activations, carried_bytes, state_bytes
from sleeptrain.plan.live import FEATURE_BYTES, Memory, Peak, peak_held
from sleeptrain.plan.parameters import Held, training_state
from sleeptrain.plan.workload import Workload
from sleeptrain.sleep.rounds import Round, windows_of


@dataclass(frozen=True)
class StageMemory:
    """weights, master, gradients, optimizer: see `TrainingState`. state: S that is carried from step to step.

    boundary: what rounds keep for their backward besides their activations. activations: of the graphs that are alive
    at once, logits left out. logits: of one round. messages: between pipeline stages.
    """

    weights: int
    master: int
    gradients: int
    optimizer: int
    state: int
    boundary: int
    activations: int
    logits: int
    messages: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def stage_memory(
    config: Config, workload: Workload, held: Sequence[Held], plan: Schedule, stage: int, kernels: bool
) -> StageMemory:
    """plan: of the replica's step; with one stage only its stages are read. kernels: as on a GPU."""
    layers = range(*plan.stages.bounds[stage : stage + 2])
    trained = bool(workload.trained(config.parallel.pipeline))
    state = training_state(
        held, config.parallel.zero, (config.parallel.tensor, config.parallel.pipeline, workload.replicas)
    )
    counts = Activations.of(config, kernels)
    model = local_config(config.model, config.parallel.tensor)
    carried = [carried_bytes(config, workload, model, kind) * workload.rows for kind in model.layers]
    ends = layers.stop == len(model.layers)
    if config.parallel.pipeline > 1:
        peak = peak_held(
            plan, stage, Memory(model.dim, carried, workload.rows, workload.carried, model.norm_between_passes)
        )
    else:
        peak = Peak(_boundary(counts, config, workload), 0)
    kept = sum(carried[i] for i in layers) * workload.num_micros if workload.carried else 0
    return StageMemory(
        state.weights, state.master, state.gradients, state.optimizer,
        state=kept,
        boundary=peak.boundary,
        activations=_graphs(counts, config, workload, layers) + counts.casts(layers, ends) * trained,
        logits=counts.logits(max(workload.targets_of(r) for r in workload.rounds)) if ends else 0,
        messages=peak.messages,
    )  # fmt: skip


@dataclass(frozen=True)
class _Graph:
    """kept: of a round's forward. again: what its backward makes besides, one block at a time."""

    kept: int
    again: int


def _graph(counts: Activations, config: Config, workload: Workload, r: Round, layers: range) -> _Graph:
    """Of one round on these layers; under `sleep.recompute=block` checkpointed blocks keep their features and S."""
    planned = workload.layers_of(r, config)
    own = [i for i in layers if i in planned]
    kinds = config.model.layers
    blocks = [counts.block(i, r, r.state_only and i == planned.stop - 1) for i in own]
    head = 0
    if layers.stop == len(kinds):
        head = counts.fed_back(r) + (counts.head(workload.targets_of(r)) if r.loss else 0)
    if config.sleep.recompute != "block":
        return _Graph(sum(blocks) + head, 0)
    features = len(r.rows) * (r.stop - r.start) * counts.model.dim * FEATURE_BYTES // counts.token_parts
    inputs = sum(features + len(r.rows) * state_bytes(counts.model, kinds[i]) for i in own)
    return _Graph(inputs + head, max(blocks, default=0))


def _graphs(counts: Activations, config: Config, workload: Workload, layers: range) -> int:
    """The graphs of a micro-batch that are alive at once: of one round where rounds are run again, else of all."""
    one = config.parallel.pipeline > 1 or config.sleep.recompute in ("pass", "window")
    groups = [[r] for r in workload.trained(config.parallel.pipeline)] if one else workload.stretches
    graphs = [[_graph(counts, config, workload, r, layers) for r in group] for group in groups]
    return max((sum(g.kept for g in group) + max(g.again for g in group) for group in graphs if group), default=0)


def _boundary(counts: Activations, config: Config, workload: Workload) -> int:
    """Without a pipeline, of `sleep.recompute=pass` or `window`: features and S at the borders of rounds or windows."""
    if config.sleep.recompute not in ("pass", "window"):
        return 0
    S = sum(state_bytes(counts.model, kind) for kind in counts.model.layers)
    most = 0
    for stretch in workload.stretches:
        windows = [sum(_border(counts, r, S, group) for r in group) for group in windows_of(stretch)]
        rows = [max(len(r.rows) for r in group) for group in windows_of(stretch)]
        if config.sleep.recompute == "window":
            most = max(most, max(windows, default=0) + S * sum(rows))
        else:
            most = max(most, sum(windows))
    return most


def _border(counts: Activations, r: Round, S: int, window: Sequence[Round]) -> int:
    """What a round keeps: S, and the features it reads; a wake pass that sleep follows, the embedded tokens."""
    reads = not r.is_wake or any(not other.is_wake for other in window)
    features = len(r.rows) * (r.stop - r.start) * counts.model.dim * FEATURE_BYTES
    return len(r.rows) * S + features * reads
