"""The time of a whole step on one GPU, from the count of its rounds, and the share of the peak that it means."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import torch

from sleeptrain.config.schema import Config
from sleeptrain.data.batch import IGNORE, Batch
from sleeptrain.distributed.gpus import Gpu
from sleeptrain.ops.row_stacks import FEW, STACKED
from sleeptrain.plan.roofline.fusion import Kernel
from sleeptrain.plan.roofline.kernel_times import NOTHING, Count, count
from sleeptrain.plan.roofline.kinds import Kind
from sleeptrain.plan.roofline.rounds import Parts, RoundRecords, all_but_kept, anything
from sleeptrain.plan.workload import Workload, alike, reruns, typical_batch
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
    batch = typical_batch(config, workload.rows) if batch is None else batch
    graphs = config.train.cuda_graphs and mode == "none"
    parts = _parts(workload, batch, records, Recompute(mode).keeps_logits, graphs)
    trained = workload.trained(config.parallel.pipeline)
    work = sum((parts[r].forward(gpu, compile) for r in workload.rounds), NOTHING)
    work += sum((parts[r].backward(gpu, compile) for r in trained), NOTHING)
    if graphs:
        work += sum((parts[r].graph_copies(gpu) for r in workload.rounds), NOTHING)
        work = replace(work, host=sum(parts[r].host_with_graphs(gpu) for r in workload.rounds))
    # The sums of a step's first round are no sums. Once in the step matrices are cast, and their gradients set to zero.
    uses = len(trained) * workload.num_micros
    work = work.without(Kind.SUM, 1 / uses if uses else 0.0)
    copied = max(parts[r].copied for r in workload.rounds)
    once = [Kernel(Kind.CAST, 1, 6 * copied), Kernel(Kind.SUM, 1, 4 * copied)]
    work += count(once, gpu, 0.0) * (1 / workload.num_micros)
    config = with_recompute(config, mode)
    for r, _ in reruns(config, workload):
        work += parts[r].again(gpu, compile, anything)
    if mode == "selective":
        work += sum((parts[r].again(gpu, compile, all_but_kept) for r in trained), NOTHING)
    share = workload.num_micros * workload.replicas * config.parallel.tensor
    padded = workload.executed()
    again = padded.recompute_flops(config)
    own, all_tokens = workload.flops(config), padded.flops(config)
    return StepCount(work, own / share, all_tokens / share, (all_tokens + again) / share)


def _parts(workload: Workload, batch: Batch, records: RoundRecords, keep: bool, graphs: bool) -> dict[Round, Parts]:
    """The parts of each round; rounds of windows that differ in nothing but their place are recorded once."""
    stacked = {r: rows_together(r, workload.rounds) if graphs else STACKED for r in workload.rounds}
    kinds = [(*_kind(r, batch), stacked[r]) for r in workload.rounds]
    known = records.step_parts.setdefault((keep, *kinds), {})
    if not known:
        first = {kind: r for kind, r in zip(reversed(kinds), reversed(workload.rounds), strict=True)}
        inputs = records.inputs(batch, list(first.values()), fixed_sizes=graphs)
        pairs = zip(first.items(), inputs, strict=True)
        known |= {kind: records.of(r, i, keep, stacked[r]) for (kind, r), i in pairs}
    return {r: known[kind] for kind, r in zip(kinds, workload.rounds, strict=True)}


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
