"""Bytes that processes send in a step, by link, for the process that sends most; and the time that links need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil, log2

from sleeptrain.config.schema import Config
from sleeptrain.distributed.gpus import Gpu
from sleeptrain.model.mixers.registry import block_spec
from sleeptrain.parallel.pipeline.stages import PipelineStages
from sleeptrain.parallel.zero import limits
from sleeptrain.plan.gathers import gathered
from sleeptrain.plan.parameters import WIDE, Held, partition_size, role_groups, weight_bytes
from sleeptrain.plan.update import muon_exchange
from sleeptrain.plan.workload import Extent, Workload, alike, reruns
from sleeptrain.sleep.precision import product_bytes, residual_bytes
from sleeptrain.sleep.rounds import Round


@dataclass(frozen=True)
class LinkShares:
    """What links reach of their data sheets. None is a measurement of this code.

    inside, between: the share of the line rate inside a machine and between machines, 0..1. NCCL's own tests of large
        messages reach 0.8 to 0.9 of both.
    hop_inside, hop_between: seconds from one process to the next. A collective that passes its ring once makes
        ceil(log2 n) hops among n processes, one that reduces and gathers makes twice as many.
    """

    inside: float = 0.8
    between: float = 0.8
    hop_inside: float = 3e-6
    hop_between: float = 6e-6

    def seconds(self, gpu: Gpu, sent: float, passes: float, size: int, far: bool) -> float:
        """The time of collectives among `size` processes, one after the other.

        sent: bytes that a process sends. passes: of their rings (`RING_PASSES`). far: they leave the machine.
        """
        rate = gpu.inter * self.between if far else gpu.intra * self.inside
        hops = passes * ceil(log2(size))
        return sent / rate + hops * (self.hop_between if far else self.hop_inside)


LINK_SHARES = LinkShares()

# In a ring, a collective of b bytes makes each of n processes send this factor times b (n - 1) / n bytes.
RING_PASSES = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}
Payload = Counter[str]  # bytes by collective, of the full tensor: reduced, gathered or scattered


def sent_bytes(payload: Payload, size: int) -> float:
    """Bytes that each of `size` processes sends."""
    return sum(RING_PASSES[kind] * b for kind, b in payload.items()) * (size - 1) / size


@dataclass(frozen=True)
class TensorTraffic:
    """Traffic between the tensor ranks of one pipeline stage in a step.

    recompute: of rounds that run again to save memory.
    passes: how often collectives pass their ring, all of them together; the gradients of a block count as one.
    """

    forward: Payload
    recompute: Payload
    backward: Payload
    passes: int = 0

    @property
    def total(self) -> Payload:
        return self.forward + self.recompute + self.backward


def tensor_traffic(config: Config, workload: Workload, stages: PipelineStages, stage: int) -> TensorTraffic:
    """The traffic of one pipeline stage; empty with one tensor rank."""
    forward, recompute, backward, passes = Payload(), Payload(), Payload(), 0
    if config.parallel.tensor == 1:
        return TensorTraffic(forward, recompute, backward)
    counts = _TensorCounts(config, workload, stages, stage)
    for r, times in _alike(workload.rounds).items():
        forward += _times(counts.forward(r) + counts.loss(r), times)
        passes += times * counts.passes(r)
    for (r, extent), times in Counter((alike(r), extent) for r, extent in reruns(config, workload)).items():
        if extent is Extent.BLOCKS:
            again = counts.blocks(r) - counts.ends_of_blocks(r)
        else:
            again = counts.forward(r) - (counts.last(r) if extent is Extent.NEEDED else Payload())
        recompute += _times(again, times)
        passes += times * counts.passes(r)
    trained = workload.trained(config.parallel.pipeline)
    for r, times in _alike(trained).items():
        if not stages.split_head:  # the statistics of a shared head are joined once
            recompute += _times(counts.loss(r), workload.losses_again(config, r) * times)
        backward += _times(counts.backward(r), times)
        passes += times * counts.passes(r, backward=True)
    # In a pipeline each round has its own backward; else a stretch of rounds has one.
    backwards = [[r] for r in trained] if config.parallel.pipeline > 1 else workload.stretches
    known = {alike(r) for r in trained}
    for rounds in backwards:
        backward["all_reduce"] += counts.summed_gradients({alike(r) for r in rounds} & known)
    passes += len(backwards) * RING_PASSES["all_reduce"] * len(counts.layers)
    m = workload.num_micros
    return TensorTraffic(_times(forward, m), _times(recompute, m), _times(backward, m), passes * m)


def _alike(rounds: Iterable[Round]) -> Counter[Round]:
    return Counter(alike(r) for r in rounds)


class _TensorCounts:
    """The payloads of a round on one pipeline stage."""

    def __init__(self, config: Config, workload: Workload, stages: PipelineStages, stage: int):
        self.config, self.workload, self.stages, self.stage = config, workload, stages, stage
        self.layers = range(*stages.bounds[stage : stage + 2])
        self.sequence, self.size = config.parallel.sequence, config.parallel.tensor
        self.narrow, self.residual = product_bytes(config.train), residual_bytes(config.train)

    def forward(self, r: Round) -> Payload:
        payload, D = self.blocks(r), self.config.model.dim
        if r.is_wake and self.stage == 0:
            payload["all_reduce"] += self._tokens(r) * D * WIDE  # embeddings, of which each rank holds a part
        if self.sequence:
            # A block that only updates its state outputs no features to gather.
            has_state_only = any(state_only for _, state_only in self._blocks_run(r))
            payload["all_gather"] += (self._sections(r) - has_state_only) * self._tokens(r) * D * self.residual
        return payload

    def passes(self, r: Round, backward: bool = False) -> int:
        """How often the collectives of a round pass their ring."""
        twice, result = RING_PASSES["all_reduce"], 0
        for layer, state_only in self._blocks_run(r):
            regions = self._regions(layer, state_only)
            # Split tokens are gathered and scattered instead; the backward gathers them twice.
            result += regions * (twice + (backward and self.sequence))
            result += twice * bool(self._squares(layer, r, state_only)) + len(self._shared(layer, r))
        if self.stage == 0 and r.is_wake and not backward:
            result += twice
        if self.loss(r):
            forward = RING_PASSES["all_gather"] if self.stages.split_head else 3 * twice
            result += twice if backward else forward
        return result + self.sequence * self._sections(r)

    def loss(self, r: Round) -> Payload:
        """The maxima, target logits and sums of a loss; of a shared head, log-sum-exps and target logits."""
        if not r.loss or self.layers.stop < len(self.config.model.layers):
            return Payload()
        if self.stages.split_head:
            return Payload(all_gather=2 * WIDE * self.workload.targets_of(r) * self.size)
        return Payload(all_reduce=3 * WIDE * self.workload.targets_of(r))

    def blocks(self, r: Round) -> Payload:
        return sum((self._block(layer, r, state_only) for layer, state_only in self._blocks_run(r)), Payload())

    def ends_of_blocks(self, r: Round) -> Payload:
        """The reductions at the ends of blocks. The rerun of a checkpointed block stops ahead of them."""
        return _times(self._leave(r), sum(not state_only for _, state_only in self._blocks_run(r)))

    def last(self, r: Round) -> Payload:
        """The collectives at the end of a round, ahead of which the rerun of a checkpointed round stops."""
        if not (blocks := list(self._blocks_run(r))) or blocks[-1][1] or self.workload.selects_targets(r):
            return Payload()
        elements = self._tokens(r) * self.config.model.dim
        return self._leave(r) + (Payload(all_gather=elements * self.residual) if self.sequence else Payload())

    def backward(self, r: Round) -> Payload:
        payload, D = Payload(), self.config.model.dim
        for layer, state_only in self._blocks_run(r):
            payload += self._block_backward(layer, r, state_only)
        if self.sequence:  # of the tokens that are split at the start of prelude, core or coda
            payload["all_gather"] += self._sections(r) * self._tokens(r) * D * self.residual
        if r.loss and self.layers.stop == len(self.config.model.layers):
            payload["all_reduce"] += self.workload.targets_of(r) * D * self.narrow
        return payload

    def _blocks_run(self, r: Round) -> Iterator[tuple[int, bool]]:
        """(layer, state_only) of each block of this stage that the round runs."""
        planned = self.workload.layers_of(r, self.config)
        for i in self.layers:
            if i in planned:
                yield i, r.state_only and i == planned.stop - 1

    def _sections(self, r: Round) -> int:
        """How many of prelude, core and coda the round runs on this stage."""
        planned, (first, last) = self.workload.layers_of(r, self.config), self.stages.core
        count = 0
        for begin, end in ((0, first), (first, last), (last, len(self.config.model.layers))):
            low, high = max(begin, planned.start, self.layers.start), min(end, planned.stop, self.layers.stop)
            count += low < high
        return count

    def _block(self, layer: int, r: Round, state_only: bool) -> Payload:
        payload = self._shared(layer, r)
        if squares := self._squares(layer, r, state_only):
            payload["all_reduce"] += squares
        for _ in range(self._regions(layer, state_only)):
            if self.sequence:
                payload["all_gather"] += self._tokens(r) * self.config.model.dim * self.narrow
        if not state_only:
            payload += _times(self._leave(r), self._regions(layer, state_only))
        return payload

    def _squares(self, layer: int, r: Round, state_only: bool) -> int:
        """Bytes of the sums of squares that the ranks reduce for a mixer's norm."""
        return 0 if state_only else WIDE * self._tokens(r) * block_spec(self.config.model, layer).summed_squares

    def _regions(self, layer: int, state_only: bool) -> int:
        """How many of mixer and feed-forward the block runs."""
        return 1 if state_only or layer in self.config.model.mixer_only else 2

    def _leave(self, r: Round) -> Payload:
        size = self._tokens(r) * self.config.model.dim * self.narrow
        return Payload(reduce_scatter=size) if self.sequence else Payload(all_reduce=size)

    def _block_backward(self, layer: int, r: Round, state_only: bool) -> Payload:
        elements, payload = self._tokens(r) * self.config.model.dim, Payload()
        for collective, size in self._shared(layer, r).items():
            payload["reduce_scatter" if collective == "all_gather" else collective] += size
        if squares := self._squares(layer, r, state_only):
            payload["all_reduce"] += squares
        regions = self._regions(layer, state_only)
        payload["reduce_scatter" if self.sequence else "all_reduce"] += regions * elements * self.narrow
        if self.sequence and not state_only:
            payload["all_gather"] += regions * elements * self.narrow
        return payload

    def _shared(self, layer: int, r: Round) -> Payload:
        """The traffic inside a mixer (`MixerSpec.exchanged`)."""
        elements = self._tokens(r) * block_spec(self.config.model, layer).exchanged(self.size)
        return Payload(all_gather=elements * self.narrow) if elements else Payload()

    def summed_gradients(self, rounds: Iterable[Round]) -> int:
        """Bytes of the gradients that are summed over the ranks (`sum_gradient`) in one backward of these rounds."""
        m = self.config.model
        read, reached = set[int](), set[int]()
        for r in rounds:
            planned = self.workload.layers_of(r, self.config)
            local = {i for i in self.layers if i in planned}
            reached |= local
            read |= local - {planned.stop - 1} if r.state_only else local
        elements = sum(block_spec(m, i).partial_gradients for i in read)
        norms = sum(0 if i in m.mixer_only else 3 if m.sandwich_norms else 1 for i in read)
        return WIDE * (elements + m.dim * (len(reached) + norms) * self.sequence)

    def _tokens(self, r: Round) -> int:
        return len(r.rows) * r.length


def _times(payload: Payload, factor: int) -> Payload:
    return Payload({kind: size * factor for kind, size in payload.items() if size * factor})


@dataclass(frozen=True)
class DataTraffic:
    """Traffic between the replicas of one pipeline stage in a step.

    reduce: gradients. gather: weights. exchange: bytes for Muon from the process that sends most: matrices to their
    owners and back, tensor ranks included. passes: as in `TensorTraffic`. These are between the replicas over which
    the state is cut. copies: sums of gradients between the replicas that hold the same part of it.
    """

    reduce: Payload
    gather: Payload
    exchange: int
    passes: int = 0
    copies: Payload = field(default_factory=Payload)
    copies_passes: int = 0


def data_traffic(config: Config, workload: Workload, held: Sequence[Held]) -> DataTraffic:
    """The traffic of one pipeline stage, whose processes hold the parameters `held`."""
    zero, replicas = config.parallel.zero, workload.replicas
    shard = config.parallel.state_replicas(replicas)
    total = WIDE * sum(h.numel for h in held)
    exchange = 0 if shard * config.parallel.tensor == 1 else WIDE * muon_exchange(config, held, shard)
    if replicas == 1:
        return DataTraffic(Payload(), Payload(), exchange)
    buckets, exchanges = -(-total // (WIDE * limits.MAX_BUCKET)), 2 * bool(exchange)
    if zero == 0:
        return DataTraffic(Payload(all_reduce=total), Payload(), exchange, 2 * buckets + exchanges)
    if zero == 3:
        cut = WIDE * replicas * sum(-(-h.numel // replicas) for h in held)
        found = gathered(config, workload, held)
        gather = Payload(all_gather=WIDE * found.elements)
        return DataTraffic(Payload(reduce_scatter=cut), gather, exchange, buckets + found.times + exchanges)
    groups = list(role_groups(held, zero))
    padded = [shard * partition_size(group, shard) for group in groups]
    weights = sum(weight_bytes(group, zero) * size for group, size in zip(groups, padded, strict=True))
    gather = Payload(all_gather=weights)
    if zero == 1:
        reduce, passes = Payload(reduce_scatter=WIDE * sum(padded)), 2 * len(groups) + exchanges
        if shard == replicas:
            return DataTraffic(reduce, gather, exchange, passes)
        copies = Payload(all_reduce=WIDE * sum(padded) // shard)
        return DataTraffic(reduce, gather, exchange, passes, copies, RING_PASSES["all_reduce"] * len(groups))
    each_backward = config.parallel.pipeline == 1
    reductions = workload.num_micros * len(workload.stretches) if each_backward else 1
    passes = 2 * buckets * reductions + len(groups) + exchanges
    return DataTraffic(Payload(all_reduce=total * reductions), gather, exchange, passes)
