"""The cost of `sleeptrain report` for a run of a few minutes, and for one with a million training records.

Both are runs on text with a curriculum, evaluations and sizes of features. Their records are random, with a falling
loss that sometimes leaps, since only the number and the kinds of records matter.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import Row
from benchmarks.process import measure
from sleeptrain.config import save_resolved
from sleeptrain.config.compose import compose

METHOD = "a process for each report, start included; CPU time; the greatest resident size; the least of several"
EXPERIMENT = "stdlib"
VOCAB_SIZE = 2048
# {name: (training records, training records from one evaluation to the next, goal in seconds)}
RUNS = {"a run of 200 records": (200, 40, 3.0), "a million records": (1_000_000, 10_000, 20.0)}
GOAL_MIB = 500
MIB = 2**20


def run(quick: bool) -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (count, evaluate_every, goal) in RUNS.items():
            run_folder = _make_run(
                Path(folder) / str(count), count // 10 if quick and count > 1000 else count, evaluate_every
            )
            repeats = range(1 if quick or count > 1000 else 3)
            measured = [measure("sleeptrain.cli", ["report", run_folder]) for _ in repeats]
            rows.append(Row(name, min(seconds for seconds, _ in measured), "s", goal, "lower"))
            rows.append(Row(f"{name}: memory", min(peak for _, peak in measured) / MIB, "MiB", GOAL_MIB, "lower"))
    return rows


def _make_run(folder: Path, count: int, evaluate_every: int) -> Path:
    folder.mkdir()
    config = compose([f"experiment={EXPERIMENT}", "run.name=measured"])
    config.model.vocab_size = VOCAB_SIZE
    config.train.tokens = count * config.data.batch * config.data.sequence
    save_resolved(config, folder / "config.yaml")
    (folder / "status.json").write_text(
        json.dumps({"state": "finished", "step": count, "tokens": config.train.tokens, "attempt": None, "reason": None})
    )
    with (folder / "metrics.jsonl").open("w") as file:
        tokens = config.data.batch * config.data.sequence
        file.writelines(json.dumps(record) + "\n" for record in _records(count, tokens, evaluate_every))
    return folder


def _records(count: int, tokens: int, evaluate_every: int) -> Iterator[dict[str, Any]]:
    draw = random.Random(0)
    yield {"step": 0, "tokens": 0, "time": 0.0, "attempt": {"number": 1, "hosts": [], "processes": 1, "code": "x"}}
    for step in range(1, count + 1):
        place = {"step": step, "tokens": step * tokens, "time": 0.5 * step, "flops": step * 10**12}
        loss = 2 + 5 / (1 + step / count * 50) + draw.random() / 10 + (3 if draw.random() < 1e-4 else 0)
        speed = {"tokens_per_second": draw.uniform(1e3, 2e3), "passes_per_second": draw.uniform(10, 20)}
        shape = {"passes": 1 + 3 * (2 * step > count), "window": 128, "batch": 8, "skipped": 0, "rollbacks": 0}
        rest = {
            "lr": draw.random() / 1e3,
            "grad_norm": draw.random(),
            "failed_saves": 0,
            "data": {},
            "eta_seconds": 1.5,
        }
        yield (
            place | {"loss": loss} | shape | rest | speed | {"mfu": draw.random(), "memory_mb": draw.uniform(500, 600)}
        )
        if step % evaluate_every == 0:
            windows = {n: [loss + draw.random() / 10 for _ in range(4)] for n in ("1", "4")}
            sizes = {"features": {"pass1": 1.0, "pass2": 1.5}, "S": {"layer0": 0.5, "layer1": 0.7}}
            yield place | {"eval": {"loss": windows}}
            yield place | {"norms": sizes}
