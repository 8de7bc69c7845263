"""What a GPU would do in a round, counted from fake tensors on any machine: kernels, time by a roofline, MFU.

Nothing here is a measurement of a GPU. docs/benchmarks.md has the assumptions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from benchmarks import Row
from sleeptrain.config.compose import compose
from sleeptrain.config.schema import Config
from sleeptrain.data.batch import Batch
from sleeptrain.distributed.gpus import GPUS
from sleeptrain.ops.row_stacks import STACKED
from sleeptrain.plan.recompute import SHARE, FullestProcess
from sleeptrain.plan.roofline.kernel_times import Count
from sleeptrain.plan.roofline.kinds import Kind
from sleeptrain.plan.roofline.rounds import Parts, RoundRecords, all_but_kept, anything
from sleeptrain.plan.roofline.step import count_step, rows_together
from sleeptrain.plan.workload import Workload, workloads
from sleeptrain.sleep.recompute import AUTO, with_recompute
from sleeptrain.sleep.rounds import Round, plan_batch

METHOD = "counted on fake tensors as an H200 would run it, not measured; a row of packed text, windows of 2,048 tokens"
GPU = GPUS["H200"]
WINDOW, TOKENS, DOCUMENT = 2048, 12288, 900
EXPERIMENTS = {
    "2B": ["experiment=pretrain_2b"],
    "7B": ["experiment=pretrain_7b"],
    "Ouro 1.4B": ["experiment=stdlib", "model=ouro_1_4b_jet", "sleep=every", "train=gpu"],
}
MORE = [
    "train.residual=bf16", "sleep.curriculum=[]", f"sleep.window={WINDOW}", f"data.sequence={TOKENS}", "data.batch=1",
    "train.micro_batch=1", "parallel.tensor=1", "parallel.pipeline=1",
]  # fmt: skip
MODES = ("none", "selective", "pass")
GOAL_MFU, GOAL_KERNELS, GOAL_CASTS = 40.0, 1500, 2.0


@dataclass(frozen=True)
class Case:
    """A model with the step of packed text that is counted, at N = 4 if nothing else is said."""

    config: Config
    workload: Workload
    batch: Batch
    records: RoundRecords

    @staticmethod
    def of(
        experiment: list[str], passes: int = 4, records: RoundRecords | None = None, document: int = DOCUMENT
    ) -> Case:
        config = compose([*experiment, *MORE, f"sleep.passes={passes}"])
        batch = packed_batch(document)
        rounds = tuple(plan_batch(batch, WINDOW, passes, config.sleep))
        [workload] = workloads(config, 1)
        workload = replace(workload, rounds=rounds, stretches=(rounds,), num_targets=TOKENS)
        return Case(config, workload, batch, records or RoundRecords(config, workload.settings))

    def fitting_mode(self) -> str:
        """The fastest mode of recomputation whose planned memory fits the GPU."""
        config = with_recompute(self.config, AUTO)
        return FullestProcess(config, kernels=True).choose(self.workload, GPU.memory).mode

    def with_graphs(self) -> Case:
        """The same with CUDA graphs, under which nothing runs again."""
        train = replace(self.config.train, cuda_graphs=True)
        return replace(self, config=with_recompute(replace(self.config, train=train), "none"))

    def planned_bytes(self) -> int:
        """Bytes of memory in the configured mode of recomputation."""
        return FullestProcess(self.config, kernels=True).bytes(self.workload)

    def kinds(self) -> dict[str, Parts]:
        """The parts of one round of each kind."""
        rounds, graphs = self.workload.rounds, self.config.train.cuda_graphs
        inputs = self.records.inputs(self.batch, rounds, fixed_sizes=graphs)
        pairs = list(zip(rounds, inputs, strict=True))
        chosen: dict[str, Callable[[Round], bool]] = {
            "wake": lambda r: r.is_wake,
            "middle sleep": lambda r: not r.is_wake and not r.state_only,
            "last sleep": lambda r: r.state_only,
        }
        found = {name: next((r, i) for r, i in pairs if fits(r)) for name, fits in chosen.items()}
        stacked = {r: rows_together(r, rounds) if graphs else STACKED for r in rounds}
        return {name: self.records.of(r, i, stacked=stacked[r]) for name, (r, i) in found.items()}


def packed_batch(document: int) -> Batch:
    """A row of documents of this length; one is open at each window's end."""
    tokens = torch.zeros(1, TOKENS, dtype=torch.long)
    yes = torch.tensor([True])
    return Batch(tokens, tokens, torch.arange(TOKENS).div(document, rounding_mode="floor")[None], yes, yes)


def run(quick: bool) -> list[Row]:
    """quick: the 2B alone."""
    rows = []
    for name, experiment in EXPERIMENTS.items():
        if quick and name != "2B":
            continue
        case = Case.of(experiment)
        rows += [*_rounds(name, case, goals=name == "2B"), *_steps(name, experiment, case)]
    return rows


def _rounds(model: str, case: Case, goals: bool) -> Iterator[Row]:
    kinds, recorded = case.kinds(), case.with_graphs().kinds()
    for compile in (False, True):
        how = "compiled" if compile else "eager"
        for kind, parts in kinds.items():
            forward, backward = parts.forward(GPU, compile), parts.backward(GPU, compile)
            again = {"pass": parts.again(GPU, compile, anything), "selective": parts.again(GPU, compile, all_but_kept)}
            whole, name = forward + backward, f"{model}, {kind} round, {how}"
            goal = GOAL_KERNELS if goals and compile and kind == "wake" else None
            yield Row(f"{name}: kernels", whole.launched, "", goal, "lower")
            yield Row(f"{name}: forward", forward.total * 1e3, "ms", better="lower")
            yield Row(f"{name}: backward", backward.total * 1e3, "ms", better="lower")
            for mode, count in again.items():
                yield Row(f"{name}: run again under {mode}", count.total * 1e3, "ms", better="lower")
            yield Row(f"{name}: host", whole.host * 1e3, "ms", whole.total * 1e3 if goal else None, "lower")
            if compile:
                with_graphs = recorded[kind].host_with_graphs(GPU) * 1e3
                yield Row(f"{name}: host with CUDA graphs", with_graphs, "ms", better="lower")
            if kind == "wake":
                yield from _by_kind(name, whole, goals and compile)


def _by_kind(name: str, count: Count, goals: bool) -> Iterator[Row]:
    for kind, seconds in sorted(count.seconds.items(), key=lambda item: -item[1]):
        yield Row(f"{name}: {kind.value}", seconds * 1e3, "ms", better="lower")
    casts = 100 * count.seconds.get(Kind.CAST, 0.0) / count.total
    yield Row(f"{name}: share of casts", casts, "%", GOAL_CASTS if goals else None, "lower")
    yield Row(f"{name}: operators for which the host waits", count.waits, "", 0, "lower")


def _steps(model: str, experiment: list[str], case: Case) -> Iterator[Row]:
    """MFU of a step, without the optimizer's update and with embedding, head, loss and the casts of matrices."""
    for document, passes in ((DOCUMENT, 1), (DOCUMENT, 4), (TOKENS, 4)):
        at = case if (document, passes) == (DOCUMENT, 4) else Case.of(experiment, passes, case.records, document)
        fitting = at.fitting_mode() if model == "2B" else ""
        text = "one document" if document == TOKENS else f"documents of {document}"
        for compile in (False, True):
            for mode in MODES:
                step = count_step(at.config, at.workload, GPU, compile, at.batch, case.records, mode)
                name = f"{model}, N={passes}, {text}, {mode}, {'compiled' if compile else 'eager'}"
                goal = GOAL_MFU if model == "2B" and compile and mode == fitting else None
                yield Row(f"{name}: MFU", 100 * step.utilisation(GPU), "%", goal)
        if model == "2B" and fitting == "none":
            yield from _with_graphs(f"{model}, N={passes}, {text}, none, compiled, CUDA graphs", at.with_graphs())


def _with_graphs(name: str, case: Case) -> Iterator[Row]:
    step = count_step(case.config, case.workload, GPU, True, case.batch, case.records)
    casts = 100 * step.work.seconds.get(Kind.CAST, 0.0) / step.work.total
    yield Row(f"{name}: MFU", 100 * step.utilisation(GPU), "%", GOAL_MFU)
    yield Row(f"{name}: share of casts", casts, "%", GOAL_CASTS, "lower")
    yield Row(f"{name}: operators for which the host waits", step.work.waits, "", 0, "lower")
    yield Row(f"{name}: host", step.work.host * 1e3, "ms", step.work.total * 1e3, "lower")
    yield Row(f"{name}: planned memory", case.planned_bytes() / 1e9, "GB", SHARE * GPU.memory / 1e9, "lower")
