"""The memory of the fullest process of each pipeline stage, by kind, in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import prod

from sleeptrain.config.schema import Config
from sleeptrain.ops.row_stacks import FEW
from sleeptrain.parallel.pipeline.schedule import Schedule
from sleeptrain.parallel.pipeline.stage_split import splits_head
from sleeptrain.parallel.pipeline.stages import PipelineStages
from sleeptrain.parallel.tensor.sharding import local_config
from sleeptrain.parallel.zero.working_weights import are_narrow
from sleeptrain.plan.activations import Activations, carried_bytes, cuda_graph_bytes, state_bytes
from sleeptrain.plan.live import Memory, Peak, peak_held
from sleeptrain.plan.parameters import Held, training_state
from sleeptrain.plan.shared_head import SharedHead
from sleeptrain.plan.workload import Workload, alike
from sleeptrain.sleep.precision import residual_bytes
from sleeptrain.sleep.rounds import Round, windows_of


@dataclass(frozen=True)
class StageMemory:
    """Bytes of the fullest process of a pipeline stage.

    weights, master, gradients, optimizer: see `TrainingState`.
    state: S that is carried from step to step.
    boundary: inputs (features and S) that rounds save for their backward. Where stages share the head, also what its
        parts keep for theirs: their input and logits.
    activations: of the graphs that are alive at once, without logits.
    logits: of one round, some rows at a time.
    messages: between pipeline stages.
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
    config: Config,
    workload: Workload,
    held: Sequence[Held],
    stages: PipelineStages,
    stage: int,
    counts: Activations,
    peak: Peak | None = None,
    graphs: int | None = None,
) -> StageMemory:
    """The memory of pipeline stage `stage`.

    held: the parameters that its process holds. counts: of the configuration, in any mode of recomputation.
    peak: what the stage keeps between its tasks (`stage_peak`); None without a pipeline. graphs: its `graph_bytes`;
    None: they are counted here.
    """
    layers = range(*stages.bounds[stage : stage + 2])
    mesh = (config.parallel.tensor, config.parallel.pipeline, workload.replicas)
    state = training_state(held, config.parallel.zero, mesh, config.parallel.shard_replicas)
    ends, shared = layers.stop == len(counts.model.layers), SharedHead.of(config, workload)
    head_rows = counts.model.vocab_size if ends else 0
    if shared is not None:
        head_rows = shared.rows(stage)
    peak = Peak(_boundary(counts, config, workload), 0) if peak is None else peak
    stored = prod(mesh) > 1 and are_narrow(config.parallel.zero)  # the matrices are narrow themselves
    graphs = graph_bytes(counts, config, workload, layers) if graphs is None else graphs
    copies = 0 if stored or config.parallel.zero == 3 else counts.copies(layers, head_rows)
    if config.parallel.zero < 2 and any(len(r.rows) * r.length < FEW for r in workload.rounds):
        copies += counts.kept_rows(layers)
    carried = _carried(config, workload) if workload.carried else []
    most_targets = max(workload.targets_of(r) for r in workload.rounds)
    adds = config.parallel.zero < 2
    if shared is not None:
        logits = counts.part_logits(most_targets, head_rows, adds)
    else:
        logits = counts.logits(most_targets, adds) if ends else 0
    state_size = sum(carried[i] for i in layers) * workload.num_micros if carried else 0
    return StageMemory(
        state.weights, state.master, state.gradients, state.optimizer,
        state=state_size,
        boundary=peak.boundary,
        activations=graphs + copies + _cuda_graphs(counts, config, workload),
        logits=logits,
        messages=peak.messages,
    )  # fmt: skip


def stage_peak(config: Config, workload: Workload, plan: Schedule, stage: int) -> Peak | None:
    """What a stage of a pipeline keeps between its tasks, the same in all modes of recomputation; None without one.

    plan: the schedule of a replica's step.
    """
    if config.parallel.pipeline == 1:
        return None
    model = config.model
    sizes = Memory(
        residual_bytes(config.train) * model.dim, _carried(config, workload), workload.rows, workload.carried,
        model.norm_between_passes, SharedHead.of(config, workload),
    )  # fmt: skip
    return peak_held(plan, stage, sizes)


def _carried(config: Config, workload: Workload) -> list[int]:
    """Bytes of each layer's memory for all rows of a micro-batch, on one tensor rank."""
    model = local_config(config.model, config.parallel.tensor)
    of_kind = {kind: carried_bytes(config, workload, model, kind) * workload.rows for kind in set(model.layers)}
    return [of_kind[kind] for kind in model.layers]


@dataclass(frozen=True)
class _Graph:
    """Bytes of a round's autograd graph.

    forward: saved by its forward. backward: made again in its backward, for one block at a time.
    """

    forward: int
    backward: int


def _graph(counts: Activations, config: Config, workload: Workload, r: Round, layers: range) -> _Graph:
    """The graph of a round on these layers, with its loss unless the loss is outside of what runs again.

    Under `sleep.recompute=block` each block saves only its features and S, under `selective` also what it `kept`.
    """
    mode = config.sleep.recompute
    planned = workload.layers_of(r, config)
    local = [i for i in layers if i in planned]
    kinds = config.model.layers
    casts = config.parallel.zero == 3  # each use of a matrix makes a copy of its own
    state_only = {i: r.state_only and i == planned.stop - 1 for i in local}
    blocks = [counts.block(i, r, state_only[i]) for i in local]
    blocks = [saved + casts * counts.copies(range(i, i + 1), 0) for i, saved in zip(local, blocks, strict=True)]
    head = 0
    if layers.stop == len(kinds):
        loss = r.loss and not _rounds_again(config)
        head, targets = counts.fed_back(r, loss), workload.targets_of(r)
        if loss and splits_head(config, config.parallel.pipeline):
            head += counts.head_input(targets)
        elif loss:
            copy = casts * counts.copies(range(0), counts.model.vocab_size)
            head += counts.head(targets, keep=True) + copy
    if mode not in ("block", "selective"):
        return _Graph(sum(blocks) + head, 0)
    features = counts.features(r) // counts.token_parts
    inputs = sum(features + len(r.rows) * state_bytes(counts.model, kinds[i]) for i in local)
    kept = sum(counts.kept(i, r, state_only[i]) for i in local) if mode == "selective" else 0
    return _Graph(inputs + kept + head, max(blocks, default=0))


def _rounds_again(config: Config) -> bool:
    """True if rounds run again by `sleep.recompute`. A pipeline runs rounds again with their losses."""
    return config.parallel.pipeline == 1 and config.sleep.recompute in ("pass", "window")


def _cuda_graphs(counts: Activations, config: Config, workload: Workload) -> int:
    """Bytes that `train.cuda_graphs` takes besides activations and kept rows, at each place of a micro-batch.

    Features and S that the graphs read and leave with their gradients, of whole windows, and the temporary memory of
    the backward, which places do not share: gradients of the feed-forward's gate, value and product, and of features.
    """
    if not config.train.cuda_graphs:
        return 0
    model, size = counts.model, 0
    for r in workload.rounds:
        width = 3 * model.ffn_dim + 2 * model.dim
        size += cuda_graph_bytes(model, r.whole(), counts.residual)
        size += len(r.rows) * r.whole().length * width * counts.narrow
    return size


def graph_bytes(counts: Activations, config: Config, workload: Workload, layers: range) -> int:
    """Bytes of the graphs of a micro-batch that are alive at once: of one round if rounds run again, else of all."""
    one_round = config.parallel.pipeline > 1 or _rounds_again(config)
    groups = [[r] for r in workload.trained(config.parallel.pipeline)] if one_round else workload.stretches
    if config.train.cuda_graphs:  # a place keeps its memory when its backward has ended
        groups = [[r for group in groups for r in group]]
    known = {r: _graph(counts, config, workload, r, layers) for r in {alike(r) for group in groups for r in group}}
    graphs = [[known[alike(r)] for r in group] for group in groups]
    return max((sum(g.forward for g in group) + max(g.backward for g in group) for group in graphs if group), default=0)


def _boundary(counts: Activations, config: Config, workload: Workload) -> int:
    """Bytes of features and S that `sleep.recompute=pass` and `window` save, without a pipeline.

    Losses save the features that they read in all windows.
    """
    if not _rounds_again(config):
        return 0
    S = sum(state_bytes(counts.model, kind) for kind in counts.model.layers)
    most = 0
    for stretch in workload.stretches:
        losses = sum(_loss(counts, config, workload, r, stretch) for r in stretch)
        windows = [sum(_border(counts, r, S, group) for r in group) for group in windows_of(stretch)]
        rows = [max(len(r.rows) for r in group) for group in windows_of(stretch)]
        if config.sleep.recompute == "window":
            most = max(most, max(windows, default=0) + S * sum(rows) + losses)
        else:
            most = max(most, sum(windows) + losses)
    return most


def _loss(counts: Activations, config: Config, workload: Workload, r: Round, stretch: Sequence[Round]) -> int:
    """Bytes that the loss of a round saves beyond the features that rounds save (`_border`)."""
    if not r.loss:
        return 0
    targets = workload.targets_of(r)
    features = targets * counts.model.dim * counts.residual
    saved = counts.head(targets, keep=False)
    to_the_end = workload.settings.core[1] == len(counts.model.layers) and not counts.model.norm_between_passes
    fed_back = any(other.feeds_back and other.window == r.window for other in stretch)
    shared = to_the_end and fed_back and not workload.selects_targets(r) and config.sleep.recompute == "pass"
    return saved - features * shared


def _border(counts: Activations, r: Round, S: int, window: Sequence[Round]) -> int:
    """Bytes of a round's inputs: S, and the features that it reads, or in a window that sleeps the embedded tokens."""
    reads = not r.is_wake or any(not other.is_wake for other in window)
    return len(r.rows) * S + counts.features(r) * reads
