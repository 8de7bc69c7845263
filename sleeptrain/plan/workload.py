"""The work of each curriculum stage: the round plan of a typical batch, as the trainer executes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from sleeptrain.config.schema import Config, DataConfig
from sleeptrain.data.batch import IGNORE, Batch
from sleeptrain.data.tasks.build import build_task
from sleeptrain.model.hybrid import keeps_logits
from sleeptrain.model.mixers.spec import WIDE
from sleeptrain.parallel.pipeline.stage_split import splits_head
from sleeptrain.parallel.pipeline.stages import num_trained
from sleeptrain.parallel.tensor.sharding import local_config
from sleeptrain.plan.mean_row import MeanRow, long_rows
from sleeptrain.sleep.curriculum import StepShape
from sleeptrain.sleep.flops import round_flops, step_flops
from sleeptrain.sleep.loop import LoopSettings, loop_settings
from sleeptrain.sleep.precision import product_bytes
from sleeptrain.sleep.rounds import Round, plan_batch, round_layers, windows_of
from sleeptrain.sleep.step import truncated


@dataclass(frozen=True)
class Workload:
    """A curriculum stage, and the work of a replica in one of its steps.

    first_token: tokens seen when the stage begins.
    shape: of a step.
    num_steps: of the stage.
    rows: of a micro-batch.
    num_micros: micro-batches of a replica.
    replicas: number of replicas.
    tokens: of a step, in all replicas.
    rounds: of a micro-batch.
    num_targets: of a micro-batch.
    carried: a step begins with the memory of the last step.
    stretches: the rounds, cut by `sleep.bptt_windows`.
    settings: of the loop.
    """

    first_token: int
    shape: StepShape
    num_steps: int
    rows: int
    num_micros: int
    replicas: int
    tokens: int
    rounds: tuple[Round, ...]
    num_targets: int
    carried: bool
    stretches: tuple[tuple[Round, ...], ...]
    settings: LoopSettings

    @property
    def num_rounds(self) -> int:
        """Rounds of a step, in all replicas."""
        return len(self.rounds) * self.num_micros * self.replicas

    @property
    def plans(self) -> list[tuple[Round, ...]]:
        """The rounds of each micro-batch of a replica."""
        return [self.rounds] * self.num_micros

    @property
    def sliding_window(self) -> int | None:
        return self.settings.boundary.sliding_window

    def layers_of(self, r: Round, config: Config) -> range:
        """The layers that a round runs."""
        return round_layers(r, config.model.layers, self.settings.core, self.sliding_window is not None)

    def targets_of(self, r: Round) -> int:
        """The number of targets of a round, in proportion to its tokens."""
        predicting = [len(other.rows) * other.length for other in self.rounds if other.loss]
        return round(self.num_targets * len(r.rows) * r.length / sum(predicting)) if r.loss else 0

    def flops(self, config: Config) -> int:
        """Model FLOPs of a step in all replicas: all passes counted, recomputation not (`StepResult.flops`)."""
        flops = step_flops(config.model, self.rounds, self.num_targets, self.settings.core, self.sliding_window)
        return flops * self.num_micros * self.replicas

    def executed(self) -> Workload:
        """The workload with pads counted as work, since they are computed like other tokens and take time."""
        stretches = tuple(tuple(r.executed() for r in stretch) for stretch in self.stretches)
        return replace(self, rounds=tuple(r.executed() for r in self.rounds), stretches=stretches)

    def recompute_flops(self, config: Config) -> int:
        """FLOPs of recomputation of a step, in all replicas."""
        rounds = Counter(alike(r) if r.work is None else r for r, _ in reruns(config, self))
        core, sliding = self.settings.core, self.sliding_window
        flops = sum(times * round_flops(config.model, r, core, sliding) for r, times in rounds.items())
        head = 2 * config.model.dim * config.model.vocab_size
        flops += sum(head * self.targets_of(r) * self.losses_again(config, r) for r in self.rounds if r.loss)
        return flops * self.num_micros * self.replicas

    def losses_again(self, config: Config, r: Round) -> int:
        """How often the head and the loss of a round run again. In a pipeline they are part of the round that does.

        A head that the stages share is no part of a round: its forward runs again where it does not keep its logits.
        """
        local, parallel = local_config(config.model, config.parallel.tensor), config.parallel
        if splits_head(config, parallel.pipeline):
            rows = -(-local.vocab_size // parallel.pipeline)
            return int(not keeps_logits(self.targets_of(r), rows, product_bytes(config.train)))
        itemsize = product_bytes(config.train) if parallel.tensor == 1 else WIDE
        again = not keeps_logits(self.targets_of(r), local.vocab_size, itemsize)
        if parallel.pipeline > 1:
            return 1 + again
        return int(again or config.sleep.recompute in ("pass", "window"))

    def selects_targets(self, r: Round) -> bool:
        """True if the round predicts at some of its positions only."""
        return r.loss and self.targets_of(r) < len(r.rows) * r.length

    def trained(self, pipeline: int) -> list[Round]:
        """The rounds of a micro-batch that have a backward. In a pipeline these are all up to the last loss."""
        stretches = (self.rounds,) if pipeline > 1 else self.stretches
        return [r for stretch in stretches for r in stretch[: num_trained(stretch)]]


def alike(r: Round) -> Round:
    """The round at the row's begin, as a first or second pass. Rounds that are equal then need and cost the same."""
    return Round(0, 0, r.length, min(r.pass_index, 2), r.rows, r.feeds_back, r.loss, r.coda, r.state_only)


class Extent(Enum):
    """The part of a round that runs again, without its loss (`Workload.losses_again`).

    WHOLE: the whole round. NEEDED: up to the last tensor that the backward needs. BLOCKS: each block up to that point.
    """

    WHOLE = "whole"
    NEEDED = "needed"
    BLOCKS = "blocks"


def reruns(config: Config, workload: Workload) -> Iterator[tuple[Round, Extent]]:
    """The rounds that run again in a micro-batch's backward. A pipeline reruns all, whatever `sleep.recompute` is.

    Under `selective` only work runs again that is not counted as FLOPs, and nothing is sent again.
    """
    mode, pipeline = config.sleep.recompute, config.parallel.pipeline
    trained = workload.trained(pipeline)
    for r in trained:
        if pipeline > 1:
            yield r, Extent.WHOLE
        elif mode in ("pass", "window"):
            yield r, Extent.NEEDED
        if mode == "block":
            yield r, Extent.BLOCKS
    if mode == "window":  # first the window up to the input of its last round, then each round
        for group in windows_of(trained):
            yield from ((r, Extent.WHOLE) for r in group[:-1])


def workloads(config: Config, replicas: int) -> list[Workload]:
    """The workload of each curriculum stage that the run reaches. A sampled N counts as its largest value.

    `model.vocab_size` must be known.
    """
    config = replace(config, data=reachable(config.data))
    mean, result = MeanRow(config), []
    for start, shape, num_steps in mean.stages():
        replica_rows = shape.batch // replicas
        rows = config.train.micro_batch or replica_rows
        alike_rows = config.data.source == "shards"
        batch = typical_batch(config, 1 if alike_rows else rows)
        rounds = tuple(plan_batch(batch, shape.window, shape.passes, config.sleep, config.parallel.token_parts))
        num_targets = int((batch.targets_BT != IGNORE).sum())
        if alike_rows:
            rounds, num_targets = tuple(_on_rows(r, rows) for r in rounds), num_targets * rows
        result.append(
            Workload(
                start, shape, num_steps, rows, replica_rows // rows, replicas, mean.step_tokens(shape), rounds,
                num_targets=num_targets,
                carried=bool(batch.carried_B.any()),
                stretches=tuple(tuple(s) for s in truncated(rounds, config.sleep.bptt_windows)),
                settings=loop_settings(config.sleep, shape.window, len(config.model.layers), recompute="none"),
            )
        )  # fmt: skip
    return result


def _on_rows(r: Round, rows: int) -> Round:
    """A round of one row on many rows like it."""
    return replace(r, rows=tuple(range(rows)), work=None if r.work is None else r.work * rows)


def reachable(data: DataConfig) -> DataConfig:
    """The same data; if its tokenizer does not exist yet, problems of equal length in the task's own words instead."""
    if not lacks_tokenizer(data):
        return data
    return replace(data, gsm_infinite=replace(data.gsm_infinite, tokenizer=""))


def lacks_tokenizer(data: DataConfig) -> bool:
    """True if a task names a tokenizer that does not exist. A plan does not need it."""
    named = data.gsm_infinite.tokenizer if data.source == "gsm_infinite" else ""
    return bool(named) and not Path(named).exists()


def typical_batch(config: Config, rows: int) -> Batch:
    """A batch of a task; for text, rows in the middle of long documents."""
    if config.data.source != "shards":
        return build_task(config.data).rows(config.data.seed, 0, rows)
    return long_rows(rows, config.data.sequence)
