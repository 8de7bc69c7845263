"""The time of a whole step on one GPU, from the count of its rounds, and the share of the peak that it means."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import torch

from sleeptrain.config.schema import Config
from sleeptrain.data.batch import IGNORE, Batch
from sleeptrain.distributed.gpus import Gpu
from sleeptrain.ops.row_stacks import FEW, STACKED
from sleeptrain.parallel.pipeline.stage_split import splits_head
from sleeptrain.plan.roofline.fusion import Kernel
from sleeptrain.plan.roofline.kernel_times import NOTHING, Count, count
from sleeptrain.plan.roofline.kinds import Kind
from sleeptrain.plan.roofline.rounds import Parts, RoundRecords, all_but_kept, anything
from sleeptrain.plan.workload import Extent, Workload, alike, reruns
from sleeptrain.sleep.recompute import Recompute, with_recompute
from sleeptrain.sleep.rounds import Round

CPU = torch.device("cpu")


@dataclass(frozen=True)
class StepCount:
    """Counted work of one process for one micro-batch of a step.

    work: of the GPU and the host. flops: model FLOPs of the process. padded: with pads as work. executed: with pads and
    recomputation.
    """

    work: Count
    flops: float
    padded: float
    executed: float

    @property
    def seconds(self) -> float:
        """The GPU's work, or the host's where it takes longer."""
        return max(self.work.total, self.work.host)

    def utilisation(self, gpu: Gpu) -> float:
        """Model FLOPs utilisation if the GPU need not wait for the host, 0..1."""
        return self.flops / (self.work.total * gpu.flops)

    def efficiency(self, gpu: Gpu) -> float:
        """Executed FLOPs over what the GPU's peak would do in the same time, 0..1."""
        return self.executed / (self.seconds * gpu.flops)


def count_step(
    config: Config,
    workload: Workload,
    gpu: Gpu,
    compile: bool,
    batch: Batch | None = None,
    records: RoundRecords | None = None,
    mode: str | None = None,
) -> StepCount:
    """Count a micro-batch of a step, with the whole depth of the model on one process of a tensor group.

    Without the optimizer's update and without communication. With `train.cuda_graphs` rounds are replayed, if none runs
    again. compile: blocks are compiled. batch: of one micro-batch, on the CPU, whose rounds the workload has; None: a
    typical one. records: of the same configuration, to record nothing twice. mode: of recomputation; None: the
    configured one.
    """
    mode = mode or config.sleep.recompute
    records = records or RoundRecords(config, workload.settings)
    batch = records.typical_batch(config, workload.rows) if batch is None else batch
    pipeline, graphs = config.parallel.pipeline, config.train.cuda_graphs and mode == "none"
    shared = pipeline if splits_head(config, pipeline) else 1
    parts = _parts(workload, batch, records, Recompute(mode).keeps_logits, shared, graphs)
    trained = workload.trained(pipeline)
    kinds, trained_kinds = (Counter(parts[r] for r in rounds) for rounds in (workload.rounds, trained))
    work = sum((part.forward(gpu, compile) * times for part, times in kinds.items()), NOTHING)
    work += sum((part.backward(gpu, compile) * times for part, times in trained_kinds.items()), NOTHING)
    if graphs:
        work += sum((part.graph_copies(gpu) * times for part, times in kinds.items()), NOTHING)
        work = replace(work, host=sum(part.host_with_graphs(gpu) * times for part, times in kinds.items()))
    # The sums of a step's first round are no sums. Once in the step matrices are cast, and their gradients set to zero.
    uses = len(trained) * workload.num_micros
    work = work.without(Kind.SUM, 1 / uses if uses else 0.0)
    copied = max(parts[r].copied for r in workload.rounds)
    once = [Kernel(Kind.CAST, 1, 6 * copied), Kernel(Kind.SUM, 1, 4 * copied)]
    work += count(once, gpu, 0.0) * (1 / workload.num_micros)
    config = with_recompute(config, mode)
    for (part, extent), times in Counter((parts[r], extent) for r, extent in reruns(config, workload)).items():
        loss = pipeline > 1 and extent is Extent.WHOLE and shared == 1  # a head of its own stage is part of the round
        work += part.again(gpu, compile, anything, loss) * times
    if mode == "selective":
        for part, times in trained_kinds.items():
            work += part.again(gpu, compile, all_but_kept) * times
    share = workload.num_micros * workload.replicas * config.parallel.tensor
    padded = workload.executed()
    again = padded.recompute_flops(config)
    own, all_tokens = workload.flops(config), padded.flops(config)
    return StepCount(work, own / share, all_tokens / share, (all_tokens + again) / share)


def _parts(
    workload: Workload, batch: Batch, records: RoundRecords, keep: bool, head_parts: int, graphs: bool
) -> dict[Round, Parts]:
    """The parts of each round; rounds of windows that differ in nothing but their place are recorded once."""
    parts = {}
    for r in workload.rounds:
        stacked = rows_together(r, workload.rounds) if graphs else None
        parts[r] = records.of_kind(_kind(r, batch), batch, r, keep, head_parts, stacked)
    return parts


def rows_together(r: Round, rounds: Sequence[Round]) -> int:
    """Rows of products that CUDA graphs of a round multiply with others, on average; 0: each product is added at once.

    The sleep passes of a window are together, as many as a stack holds.
    """
    rows, passes = len(r.rows) * r.length, sum(other.window == r.window and not other.is_wake for other in rounds)
    if r.is_wake or passes < 2 or rows >= FEW:
        return 0
    return rows * passes // -(-passes // (STACKED // rows))


def _kind(r: Round, batch: Batch) -> tuple[Hashable, ...]:
    """What the work of a round depends on, its place apart."""
    targets = int((batch.targets_BT[list(r.rows), r.start : r.stop] != IGNORE).sum()) if r.loss else 0
    return alike(r), r.window == 0, r.work, targets
