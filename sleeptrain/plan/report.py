"""A plan as text tables, and as one JSON object (docs/plan.md lists its keys)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from typing import Any

from sleeptrain.plan.layout import Plan
from sleeptrain.plan.links import Payload, sent_bytes
from sleeptrain.plan.memory import StageMemory
from sleeptrain.plan.planner import StepPlan
from sleeptrain.plan.recompute import SHARE
from sleeptrain.plan.speed import ASSUMPTIONS, hours
from sleeptrain.plan.workload import lacks_tokenizer


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as a JSON object. Sizes are in bytes, work in FLOPs, times in seconds."""
    config, gpu = plan.config, plan.gpu
    return {
        "run": f"{config.run.root}/{config.run.name}",
        "layout": {
            "processes": plan.processes,
            "tensor": config.parallel.tensor,
            "pipeline": config.parallel.pipeline,
            "replicas": plan.replicas,
            "zero": config.parallel.zero,
            "sequence": config.parallel.sequence,
            "stage_bounds": list(plan.bounds),
        },
        "parameters": {
            "total": plan.parameters,
            "embedding": plan.embedding_parameters,
            "body": plan.parameters - plan.embedding_parameters,
            "per_stage": [sum(h.numel for h in held) for held in plan.held],
        },
        "gpu": None if gpu is None else {"name": gpu[0], **asdict(gpu[1])},
        "efficiency": None if gpu is None else plan.efficiency,
        "assumptions": list(ASSUMPTIONS) if gpu else [],
        "recompute": {"setting": config.sleep.recompute, "memory": plan.memory},
        "warning": plan.warning,
        "tokens": config.train.tokens,
        "flops": sum(s.flops * s.workload.num_steps for s in plan.steps),
        "seconds": None if gpu is None else _hours(plan) * 3600,
        "gpu_hours": None if gpu is None else _hours(plan) * plan.processes,
        "stages": [_stage(plan, step) for step in plan.steps],
    }


def _stage(plan: Plan, step: StepPlan) -> dict[str, Any]:
    work, tensor = step.workload, plan.config.parallel.tensor
    return {
        "first_token": work.first_token,
        "passes": work.shape.passes,
        "window": work.shape.window,
        "batch": work.shape.batch,
        "micro_batches": work.num_micros,
        "steps": work.num_steps,
        "recompute": step.recompute,
        "rounds": work.num_rounds,
        "tokens": work.tokens,
        "flops": step.flops,
        "flops_per_token": step.flops / work.tokens,
        "recompute_flops": step.recompute_flops,
        "recompute_flops_per_token": step.recompute_flops / work.tokens,
        "bubble": step.simulation.bubble,
        "live_rounds": list(step.simulation.peak_live_rounds),
        "waiting_messages": list(step.simulation.peak_waiting),
        "memory": [asdict(m) | {"total": m.total} for m in step.memory],
        "links": {
            "pipeline": [{"from": a, "to": b, "bytes": n} for (a, b), n in sorted(step.pipeline.items())],
            "tensor": [
                {
                    part: dict(payload) | {"sent": sent_bytes(payload, tensor)}
                    for part, payload in (("forward", t.forward), ("recompute", t.recompute), ("backward", t.backward))
                }
                for t in step.tensor
            ],
            "data": [
                {
                    "reduce": dict(d.reduce),
                    "gather": dict(d.gather),
                    "muon_exchange": d.exchange,
                    "copies": dict(d.copies),
                }
                for d in step.data
            ],
            "tied_embeddings": step.tied,
        },
        "efficiency": step.efficiency,
        "speed": None if step.speed is None else asdict(step.speed),
    }


def to_text(plan: Plan) -> str:
    return "\n".join([*_head(plan), "", *_stages(plan), "", *_memory(plan), *_links(plan), *_speed(plan)])


def _head(plan: Plan) -> Iterable[str]:
    config, p = plan.config, plan.config.parallel
    yield f"run       {config.run.root}/{config.run.name}"
    yield (
        f"model     {short(plan.parameters)} parameters ({short(plan.embedding_parameters)} in embeddings), width "
        f"{config.model.dim}, {_kinds(config.model.layers)}"
    )
    yield f"tokens    {short(config.train.tokens)}"
    several = "es" if plan.processes > 1 else ""
    yield (
        f"layout    {plan.processes} process{several}: tensor {p.tensor}, pipeline {p.pipeline}, replicas "
        f"{plan.replicas}, ZeRO-{p.zero}{'' if p.shard_replicas is None else f' over {p.shard_replicas} of them'}"
    )
    largest = max(range(len(plan.held)), key=lambda s: sum(h.numel for h in plan.held[s]))
    numel = sum(h.numel for h in plan.held[largest])
    yield f"fullest   {short(numel)} parameters a process, on stage {largest} of blocks {list(plan.bounds)}"
    if plan.warning:
        yield f"warning   {plan.warning}"
    if lacks_tokenizer(config.data):
        yield f"tokenizer {config.data.gsm_infinite.tokenizer} does not exist; the plan uses words as tokens"


def _kinds(layers: Sequence[str]) -> str:
    return ", ".join(f"{layers.count(kind)} {kind}" for kind in dict.fromkeys(layers))


def _stages(plan: Plan) -> Iterable[str]:
    yield "stages of the curriculum; a step in all processes"
    rows = []
    for s in plan.steps:
        w = s.workload
        rows.append(
            [
                short(w.first_token), w.shape.passes, w.shape.window, w.shape.batch, w.num_micros, w.num_steps,
                s.recompute, w.num_rounds, short(s.flops), short(s.flops / w.tokens),
                short(s.recompute_flops / w.tokens), f"{s.simulation.bubble:.1%}", max(s.simulation.peak_live_rounds),
            ]
        )  # fmt: skip
    names = (
        "from token|N|L tokens|rows|micro-batches|steps|recompute|rounds/step|FLOPs/step|FLOPs/token|recomputed/token"
    )
    yield from table([*names.split("|"), "bubble", "live rounds"], rows)
    if plan.memory is not None:
        yield f"sleep.recompute=auto chose the mode within {SHARE:.0%} of {_whose(plan)}"
    total = sum(s.flops * s.workload.num_steps for s in plan.steps)
    steps = sum(s.workload.num_steps for s in plan.steps)
    yield f"in all {steps} steps, {short(total)} FLOPs with all passes counted, recomputed ones not"


def _whose(plan: Plan) -> str:
    """The memory within which `sleep.recompute=auto` chose, in words."""
    assert plan.memory is not None
    size = f"{gib(plan.memory)} GiB"
    return f"{size} of {plan.gpu[0]}" if plan.gpu else f"{size}, assumed from this machine: name a GPU (--gpu H200)"


def _memory(plan: Plan) -> Iterable[str]:
    kernels = "flash-linear-attention's kernels" if plan.gpu else "PyTorch's own recurrences, as on a CPU"
    yield f"memory of the fullest process of each pipeline stage, at its worst in the run, GiB ({kernels})"
    kinds = [field.name for field in fields(StageMemory)]
    rows = []
    for stage in range(len(plan.held)):
        worst = max((s.memory[stage] for s in plan.steps), key=lambda m: m.total)
        rows.append([stage, *(gib(getattr(worst, kind)) for kind in kinds), gib(worst.total)])
    yield from table(["stage", *kinds, "total"], rows)
    if plan.gpu is not None:
        name, gpu = plan.gpu
        share = worst_total(plan) / gpu.memory
        verdict = "fits" if share <= SHARE else "is tight" if share <= 1 else "does not fit"
        yield f"{name}: {gib(gpu.memory)} GiB, of which the fullest process takes {share:.0%}: {verdict}"
    yield ""


def _links(plan: Plan) -> Iterable[str]:
    step, tensor = plan.largest, plan.config.parallel.tensor
    shard = plan.config.parallel.state_replicas(plan.replicas)
    if plan.processes == 1:
        return
    yield "sent by the process that sends most, in a step of the stage with the most work, MB"

    def largest(payloads: Iterable[Payload], size: int) -> float:
        return max(sent_bytes(p, size) for p in payloads)

    rows = [
        ["pipeline", mb(max(step.pipeline.values(), default=0)), "features and gradients, on the busiest link"],
        ["tensor", mb(largest((t.forward for t in step.tensor), tensor)), "forward"],
        ["tensor", mb(largest((t.recompute for t in step.tensor), tensor)), "run again to save memory"],
        ["tensor", mb(largest((t.backward for t in step.tensor), tensor)), "backward"],
        ["data", mb(largest((d.reduce for d in step.data), shard)), "gradients"],
        ["data", mb(largest((d.gather for d in step.data), shard)), "weights"],
        ["data", mb(max(d.exchange for d in step.data)), "matrices for Muon, and back"],
        ["copies", mb(largest((d.copies for d in step.data), plan.replicas // shard)), "gradients of the same state"],
        ["tied", mb(step.tied), "gradient of the embeddings"],
    ]
    yield from table(["link", "MB", "what"], rows)
    yield ""


def _speed(plan: Plan) -> Iterable[str]:
    if plan.gpu is None:
        yield "no forecast of time: name a GPU (--gpu H200)"
        return
    if plan.efficiency is None:
        yield f"forecast for {plan.gpu[0]}, at the share of its peak that is counted from the operators of a step"
    else:
        yield f"forecast for {plan.gpu[0]}, at {plan.efficiency:.0%} of its peak, as named by --efficiency"
    rows = []
    for s in plan.steps:
        v = s.speed
        assert v is not None and s.efficiency is not None
        rows.append(
            [
                s.workload.shape.passes, s.workload.shape.window, f"{s.efficiency:.1%}", f"{v.tokens_per_second:,.0f}",
                f"{v.tokens_per_second / plan.processes:,.0f}", f"{v.mfu:.1%}",
                *(f"{x:.3g}" for x in (v.seconds, v.compute, v.bubble, v.tensor, v.data, v.update)),
            ]
        )  # fmt: skip
    names = ["N", "L tokens", "of peak", "tokens/s", "tokens/s/GPU", "MFU"]
    yield from table([*names, "step s", "compute s", "bubble s", "tensor s", "data s", "update s"], rows)
    yield f"the run: {_hours(plan):.3g} h, {_hours(plan) * plan.processes:.4g} GPU-hours"
    yield "assumed:"
    yield from (f"  {line}" for line in ASSUMPTIONS)


def _hours(plan: Plan) -> float:
    return hours([s.speed for s in plan.steps if s.speed], [s.workload.num_steps for s in plan.steps])


def worst_total(plan: Plan) -> int:
    """Bytes of the fullest of all processes, in any step."""
    return max(m.total for s in plan.steps for m in s.memory)


def table(names: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Rows of text. All columns are aligned to the right, except a last column named `what`."""
    cells = [[str(name) for name in names], *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
    last_is_text = names[-1] == "what"

    def line(row: Sequence[str]) -> str:
        parts = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        if last_is_text:
            parts[-1] = row[-1].ljust(widths[-1])
        return "  " + "  ".join(parts).rstrip()

    return [line(row) for row in cells]


def gib(number: float) -> str:
    return f"{number / 2**30:.3g}"


def mb(number: float) -> str:
    return f"{number / 1e6:,.1f}"


def short(number: float) -> str:
    for size, unit in (
        (1e24, "Y"),
        (1e21, "Z"),
        (1e18, "E"),
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e3, "k"),
    ):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"
