"""What each stage of the curriculum has to do: the same round plan that the trainer executes, for a typical batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from sleeptrain.config.schema import Config, DataConfig
from sleeptrain.data.batch import IGNORE, Batch
from sleeptrain.data.tasks.build import build_task
from sleeptrain.parallel.pipeline.stages import num_trained
from sleeptrain.plan.mean_row import MeanRow, long_rows
from sleeptrain.sleep.curriculum import StepShape
from sleeptrain.sleep.flops import round_flops, step_flops
from sleeptrain.sleep.loop import LoopSettings, loop_settings
from sleeptrain.sleep.rounds import Round, plan_batch, round_layers, windows_of
from sleeptrain.sleep.step import truncated


@dataclass(frozen=True)
class Workload:
    """A stage of the curriculum: its shape, its steps, and what each replica does in one of them.

    rounds: of one micro-batch of `rows` rows. num_micros: micro-batches of a replica. num_targets: of a micro-batch.
    tokens: of a step, all replicas together. carried: a step begins with the memory that the one before left.
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
    stretches: tuple[tuple[Round, ...], ...]  # as `sleep.bptt_windows` cuts the rounds
    settings: LoopSettings

    @property
    def num_rounds(self) -> int:
        """Of a step, in all replicas."""
        return len(self.rounds) * self.num_micros * self.replicas

    @property
    def plans(self) -> list[tuple[Round, ...]]:
        """The rounds of each of a replica's micro-batches."""
        return [self.rounds] * self.num_micros

    @property
    def sliding_window(self) -> int | None:
        return self.settings.boundary.sliding_window

    def layers_of(self, r: Round, config: Config) -> range:
        return round_layers(r, config.model.layers, self.settings.core, self.sliding_window is not None)

    def targets_of(self, r: Round) -> int:
        """The targets of a round: its share of the tokens that predict."""
        predicting = [len(other.rows) * (other.stop - other.start) for other in self.rounds if other.loss]
        return round(self.num_targets * len(r.rows) * (r.stop - r.start) / sum(predicting)) if r.loss else 0

    def flops(self, config: Config) -> int:
        """Model FLOPs of a step in all replicas, passes counted, recomputation not (`StepResult.flops`)."""
        flops = step_flops(config.model, self.rounds, self.num_targets, self.settings.core, self.sliding_window)
        return flops * self.num_micros * self.replicas

    def executed(self) -> Workload:
        """The same with pads for work, which are computed like other tokens: what time goes by."""
        stretches = tuple(tuple(r.executed() for r in stretch) for stretch in self.stretches)
        return replace(self, rounds=tuple(r.executed() for r in self.rounds), stretches=stretches)

    def recompute_flops(self, config: Config) -> int:
        """FLOPs of a step in all replicas that repeat others, to save memory."""
        flops = 0
        for r, extent in reruns(config, self):
            flops += round_flops(config.model, r, self.settings.core, self.sliding_window)
            if extent is not Extent.BLOCKS:
                flops += 2 * config.model.dim * config.model.vocab_size * self.targets_of(r)
        return flops * self.num_micros * self.replicas

    def trained(self, pipeline: int) -> list[Round]:
        """The rounds of a micro-batch that have a backward: a pipeline goes back through all before the last loss."""
        stretches = (self.rounds,) if pipeline > 1 else self.stretches
        return [r for stretch in stretches for r in stretch[: num_trained(stretch)]]


class Extent(Enum):
    """How far a round is run again: with all that it sends and leaves; until the backward has what it needs; or each of
    its blocks so far."""

    WHOLE = "whole"
    KEPT = "kept"
    BLOCKS = "blocks"


def reruns(config: Config, workload: Workload) -> Iterator[tuple[Round, Extent]]:
    """What runs again in a micro-batch's backward. A stage runs each round again, whatever `sleep.recompute` is."""
    mode, pipeline = config.sleep.recompute, config.parallel.pipeline
    trained = workload.trained(pipeline)
    for r in trained:
        if pipeline > 1:
            yield r, Extent.WHOLE
        elif mode in ("pass", "window"):
            yield r, Extent.KEPT
        if mode == "block":
            yield r, Extent.BLOCKS
    if mode == "window":  # first the window, as far as its last round's input, then each round
        for group in windows_of(trained):
            yield from ((r, Extent.WHOLE) for r in group[:-1])


def workloads(config: Config, replicas: int) -> list[Workload]:
    """Of every stage that the run reaches; sampled N counts as its largest. `model.vocab_size` must be known."""
    config = replace(config, data=reachable(config.data))
    mean, found = MeanRow(config), []
    for start, shape, num_steps in mean.stages():
        own_rows = shape.batch // replicas
        rows = config.train.micro_batch or own_rows
        batch = typical_batch(config, rows)
        rounds = tuple(plan_batch(batch, shape.window, shape.passes, config.sleep))
        found.append(
            Workload(
                start, shape, num_steps, rows, own_rows // rows, replicas, mean.step_tokens(shape), rounds,
                num_targets=int((batch.targets_BT != IGNORE).sum()),
                carried=bool(batch.carried_B.any()),
                stretches=tuple(tuple(s) for s in truncated(rounds, config.sleep.bptt_windows)),
                settings=loop_settings(config.sleep, shape.window, len(config.model.layers)),
            )
        )  # fmt: skip
    return found


def reachable(data: DataConfig) -> DataConfig:
    """The same data, or where its tokenizer is not there yet, problems as long in words of the task's own."""
    if not lacks_tokenizer(data):
        return data
    return replace(data, gsm_infinite=replace(data.gsm_infinite, tokenizer=""))


def lacks_tokenizer(data: DataConfig) -> bool:
    """Whether a task names a tokenizer that is not there: a plan can do without."""
    named = data.gsm_infinite.tokenizer if data.source == "gsm_infinite" else ""
    return bool(named) and not Path(named).exists()


def typical_batch(config: Config, rows: int) -> Batch:
    """Rows in the middle of long documents; for a task, a batch of it."""
    if config.data.source != "shards":
        return build_task(config.data).rows(config.data.seed, 0, rows)
    return long_rows(rows, config.data.sequence)
