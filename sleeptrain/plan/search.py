"""Search the layouts of a run: every one that a start allows, ranked by the forecast of the plan.

A layout is tried only if it may be among the best: no step is faster than `Planner.least_compute` or `least_seconds`.
The best layouts are the same as if all were tried.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import gcd, inf

from sleeptrain.config.schema import Config
from sleeptrain.config.validate import values_in_force
from sleeptrain.config.vocabulary import with_vocabulary
from sleeptrain.distributed.gpus import Gpu
from sleeptrain.errors import ConfigError
from sleeptrain.parallel.layout_check import ZERO_STAGES, check_layout
from sleeptrain.plan.collector import paused_collector
from sleeptrain.plan.layout import vocabulary
from sleeptrain.plan.planner import Planner
from sleeptrain.plan.recompute import SHARE, choose
from sleeptrain.plan.speed import GPUS_A_MACHINE, hours
from sleeptrain.plan.workload import Workload
from sleeptrain.sleep.recompute import AUTO, MODES, with_recompute

MOST = 10  # layouts that are shown
LARGE = 0.2  # the share of a run's time from which on a bubble or communication is what limits it
Cut = tuple[int, int, int]  # tensor ranks, pipeline stages, ZeRO stage


@dataclass(frozen=True)
class Found:
    """A layout and its forecast.

    config: with its settings. modes: of recomputation, of each stage of the curriculum. memory: bytes of the fullest
    process. hours: of the run. mfu: of the run, 0..1.
    compute, bubble, links: shares of the run's time, 0..1; the rest is the optimizer's update.
    host_bound: calls of the host take longer than the GPU's work, in most of the run's time.
    """

    config: Config
    modes: tuple[str, ...]
    memory: int
    hours: float
    mfu: float
    compute: float
    bubble: float
    links: float
    host_bound: bool

    @property
    def settings(self) -> str:
        """The settings as words of a command line."""
        parallel = self.config.parallel
        words = {f"parallel.{name}": getattr(parallel, name) for name in ("tensor", "pipeline", "zero")}
        if parallel.pipeline > 1:
            words["parallel.split_head"] = str(parallel.split_head).lower()
        if parallel.shard_replicas is not None:
            words["parallel.shard_replicas"] = parallel.shard_replicas
        words |= {"train.micro_batch": self.config.train.micro_batch, "sleep.recompute": self.config.sleep.recompute}
        return " ".join(f"{name}={value}" for name, value in words.items())

    @property
    def limit(self) -> str:
        """What takes most of the time that another layout might save."""
        share, name = max((self.bubble, "pipeline bubble"), (self.links, "communication"))
        return name if share > LARGE else "the host" if self.host_bound else "compute"


@dataclass
class Search:
    """The result.

    best: the fastest layout of each way to cut the model (tensor ranks, pipeline stages, ZeRO), fastest first.
    refused: layouts by the reason why a start refuses them; a cut that no further setting saves counts once.
    too_large: layouts that do not fit into the GPU's memory. slower: layouts that cannot be among the best.
    forecast: layouts whose time was worked out. layouts, waiting: all that a start allows, and those to come.
    """

    best: list[Found] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    too_large: int = 0
    slower: int = 0
    forecast: int = 0
    layouts: int = 0
    waiting: int = 0


def search(
    config: Config,
    processes: int,
    gpu: tuple[str, Gpu],
    efficiency: float | None,
    progress: Callable[[Search], None] = lambda so_far: None,
) -> Search:
    """Try the layouts of a run on `processes` GPUs.

    efficiency: as in `make_plan`. progress: called with the counts before each layout.
    Raises ConfigError, with the refusals, if a start allows none.
    """
    config = with_vocabulary(config, config.model.vocab_size or vocabulary(config))
    with paused_collector():
        return _Searcher(config, processes, gpu[1], efficiency, progress).run()


@dataclass(frozen=True)
class _Layout:
    """A layout that a start allows. modes: of recomputation, that it allows."""

    config: Config
    replicas: int
    modes: tuple[str, ...]

    @property
    def cut(self) -> Cut:
        parallel = self.config.parallel
        return parallel.tensor, parallel.pipeline, parallel.zero


class _Searcher:
    def __init__(
        self, config: Config, processes: int, gpu: Gpu, efficiency: float | None, progress: Callable[[Search], None]
    ):
        self.config, self.processes, self.gpu = config, processes, gpu
        self.planner, self.progress = Planner(gpu, efficiency), progress
        self.result = Search()
        self.best: dict[Cut, Found] = {}

    def run(self) -> Search:
        """Take the layout with the least bound next, and work out a closer bound, or at the end its time.

        Few pipeline stages come first: their schedules are short, and their times pass over most of the longer ones.
        Among equally many, a layout that has a schedule goes on first, for only the last few schedules are kept.
        """
        waiting = [
            (layout.config.parallel.pipeline, 1, self._least_compute(layout, m), n, layout, self._bounds(layout, m))
            for n, (layout, m) in enumerate((layout, m) for layout in self._layouts() for m in (*layout.modes, AUTO))
        ]
        self.result.layouts = len(waiting)
        heapq.heapify(waiting)
        while waiting:
            self.result.waiting = len(waiting)
            self.progress(self.result)
            pipeline, _, least, number, layout, bounds = heapq.heappop(waiting)
            if least >= self._to_beat(layout):
                self.result.slower += 1
            elif (closer := next(bounds, None)) is not None:
                bound, scheduled = closer
                heapq.heappush(waiting, (pipeline, 1 - scheduled, max(bound, least), number, layout, bounds))
        if not self.best and not self.result.too_large:
            reasons = "; ".join(self.result.refused)
            raise ConfigError(f"a start on {self.processes} processes allows no layout of this run: {reasons}")
        ranked = sorted(self.best.values(), key=lambda f: (f.hours, f.memory, f.config.parallel.zero))
        self.result.best = list({(f.hours, f.memory): f for f in reversed(ranked)}.values())[::-1][:MOST]
        return self.result

    def _layouts(self) -> Iterator[_Layout]:
        for tensor in _divisors(self.processes):
            for pipeline in _divisors(self.processes // tensor):
                cut = _with(self.config, tensor, pipeline, 1, 1, "none", False)
                if tensor > GPUS_A_MACHINE:
                    self.result.refused[f"tensor ranks on more than one machine of {GPUS_A_MACHINE} GPUs"] += 1
                elif self._allowed(cut) is not None:
                    yield from self._layouts_of(tensor, pipeline)

    def _layouts_of(self, tensor: int, pipeline: int) -> Iterator[_Layout]:
        replicas = self.processes // (tensor * pipeline)
        rows = [b // replicas for _, b in values_in_force(self.config, "batch", self.config.data.batch, "data.batch")]
        sizes = [*_divisors(gcd(*rows)), *([0] if len(set(rows)) > 1 else [])]
        heads = (False, True) if pipeline > 1 else (self.config.parallel.split_head,)
        for zero, size, head in product(ZERO_STAGES, sizes, heads):
            modes = [m for m in MODES if self._allowed(_with(self.config, tensor, pipeline, zero, size, m, head))]
            if not modes:
                continue
            layout = _with(self.config, tensor, pipeline, zero, size, modes[0], head)
            yield _Layout(layout, replicas, tuple(modes))
            shard = GPUS_A_MACHINE // tensor  # the replicas of a machine
            if zero == 1 and shard < replicas and replicas % shard == 0 and GPUS_A_MACHINE % tensor == 0:
                parallel = replace(layout.parallel, shard_replicas=shard)
                yield _Layout(replace(layout, parallel=parallel), replicas, tuple(modes))

    def _allowed(self, config: Config) -> int | None:
        """The number of replicas, if a start allows the layout; else None, and the reason is counted."""
        try:
            return check_layout(config, self.processes)
        except ConfigError as error:
            self.result.refused[_reason(error)] += 1
            return None

    def _works(self, layout: _Layout) -> list[Workload]:
        return self.planner.workloads(layout.config, layout.replicas)

    def _least_compute(self, layout: _Layout, mode: str) -> float:
        """Hours of work and waiting that a run takes at least. Under `auto` each stage may have the fastest mode."""
        modes = [with_recompute(layout.config, m) for m in (layout.modes if mode == AUTO else [mode])]
        works = self._works(layout)

        def least(config: Config, work: Workload) -> float:
            return self.planner.least_compute(config, self.processes, work, counted=False)

        return _hours([min(least(config, work) for config in modes) for work in works], works)

    def _bounds(self, layout: _Layout, mode: str) -> Iterator[tuple[float, bool]]:
        """Hours that a run takes at least, each bound closer and dearer than the one before, and then its time.

        With each: True if it takes a schedule. At first its memory is the least and stages wait as little as they can,
        then as in the schedule. A layout that does not fit is counted.
        """
        works = self._works(layout)
        configs = [self._chosen(with_recompute(layout.config, mode), work, peaks=False) for work in works]
        if not self._fits(configs, works, peaks=False):
            return
        pairs = list(zip(configs, works, strict=True))
        yield _hours([self.planner.least_compute(c, self.processes, w, counted=True) for c, w in pairs], works), False
        seconds = [self.planner.least_seconds(c, self.processes, w) for c, w in pairs]
        yield _hours(seconds, works), False
        if layout.config.parallel.pipeline > 1:
            for stage, (config, work) in enumerate(pairs):
                seconds[stage] = self.planner.speed(config, self.processes, work).seconds
                yield _hours(seconds, works), True
        self._try(layout, mode)

    def _to_beat(self, layout: _Layout) -> float:
        """The hours from which on a layout is not among the best."""
        own = self.best[layout.cut].hours if layout.cut in self.best else inf
        ranked = sorted({(found.hours, found.memory) for found in self.best.values()})
        return min(own, ranked[MOST - 1][0]) if len(ranked) >= MOST else own

    def _try(self, layout: _Layout, mode: str) -> None:
        works = self._works(layout)
        config = with_recompute(layout.config, mode)
        configs = [self._chosen(config, work) for work in works]
        modes = [c.sleep.recompute for c in configs]
        if mode == AUTO and len(set(modes)) == 1:
            return  # the layout with this mode is tried by itself
        if not self._fits(configs, works):
            return
        self.result.forecast += 1
        found = self._found(config, configs, works)
        if layout.cut not in self.best or found.hours < self.best[layout.cut].hours:
            self.best[layout.cut] = found

    def _chosen(self, config: Config, work: Workload, peaks: bool = True) -> Config:
        """The configuration with a mode; peaks: as in `Planner.memory`."""
        choice = choose(config, lambda tried: self.planner.fullest(tried, work, peaks), self.gpu.memory)
        return with_recompute(config, choice.mode)

    def _fits(self, configs: Sequence[Config], works: Sequence[Workload], peaks: bool = True) -> bool:
        """True if the stages of the curriculum fit into the GPU; else the layout is counted."""
        most = max(self.planner.fullest(c, w, peaks) for c, w in zip(configs, works, strict=True))
        self.result.too_large += most > SHARE * self.gpu.memory
        return most <= SHARE * self.gpu.memory

    def _found(self, config: Config, configs: Sequence[Config], works: Sequence[Workload]) -> Found:
        def total(values: Iterable[float]) -> float:
            return sum(value * work.num_steps for value, work in zip(values, works, strict=True))

        pairs = list(zip(configs, works, strict=True))
        speeds = [self.planner.speed(c, self.processes, w) for c, w in pairs]
        seconds = total(s.seconds for s in speeds)
        waits = [s.seconds * self.planner.host_bound(c, w) for s, (c, w) in zip(speeds, pairs, strict=True)]
        return Found(
            config, tuple(c.sleep.recompute for c in configs), max(self.planner.fullest(c, w) for c, w in pairs),
            hours(speeds, [w.num_steps for w in works]),
            mfu=total(w.flops(config) for w in works) / (seconds * self.processes * self.gpu.flops),
            compute=total(s.compute for s in speeds) / seconds,
            bubble=total(s.bubble for s in speeds) / seconds,
            links=total(s.tensor + s.data for s in speeds) / seconds,
            host_bound=total(waits) > seconds / 2,
        )  # fmt: skip


def _with(
    config: Config, tensor: int, pipeline: int, zero: int, micro_batch: int, mode: str, split_head: bool
) -> Config:
    parallel = replace(
        config.parallel, tensor=tensor, pipeline=pipeline, zero=zero, shard_replicas=None, split_head=split_head
    )
    return with_recompute(
        replace(
            config,
            parallel=parallel,
            train=replace(config.train, micro_batch=micro_batch),
        ),
        mode,
    )


def _reason(error: ConfigError) -> str:
    """The first clause of a refusal without its numbers, so that layouts with the same fault count together."""
    return re.sub(r"\d+", "n", re.split("[:;] ", str(error))[0])


def _hours(seconds: Sequence[float], works: Sequence[Workload]) -> float:
    return sum(s * w.num_steps for s, w in zip(seconds, works, strict=True)) / 3600


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
