"""Runs made by hand: a composed configuration and records with known numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from functools import cache, reduce
from pathlib import Path
from typing import Any

from sleeptrain.config import save_resolved
from sleeptrain.config.compose import compose
from sleeptrain.config.schema import Config
from sleeptrain.report.groups import Section, sections
from sleeptrain.report.records import collect
from sleeptrain.report.runs import ReadRun, find_runs

STEP = 21 * 8  # tokens of a step of SMALL
SMALL = ("sleep.passes=1", "data.batch=8", "train.tokens=1680")


def composed(*overrides: str) -> Config:
    """A copy, which a test may change, of what is composed once."""
    return deepcopy(_composed(*overrides))


@cache
def _composed(*overrides: str) -> Config:
    """The configuration of `experiment=rule110`, unless the overrides name another."""
    experiment = [] if any(o.startswith("experiment=") for o in overrides) else ["experiment=rule110"]
    config = compose([*experiment, *SMALL, *overrides])
    config.model.vocab_size = config.model.vocab_size or 3
    return config


def step(number: int, loss: float = 1.0, **more: Any) -> dict[str, Any]:
    shape = {"passes": 1, "window": 20, "batch": 8, "skipped": 0, "rollbacks": 0}
    return {"step": number, "tokens": number * STEP, "time": 100.0 + number, "loss": loss} | shape | more


def evaluation(number: int, losses: dict[str, list[float | None]], **more: Any) -> dict[str, Any]:
    return {"step": number, "tokens": number * STEP, "time": 100.0 + number, "eval": {"loss": losses, **more}}


def accuracy(number: int, value: float, passes: int = 1, awake: float = 0.25, **guessing: float) -> dict[str, Any]:
    """An evaluation of Rule 110 with `passes` and with one pass."""
    shares = {"1": awake, str(passes): value}
    metrics = {n: {"bits": share, "sampled": share / 2} for n, share in shares.items()}
    losses: dict[str, list[float | None]] = {n: [None, 2 - share] for n, share in shares.items()}
    return evaluation(number, losses, accuracy=shares, metrics=metrics, guessing=guessing)


def attempt(number: int, at: int, time: float, code: str = "v1") -> dict[str, Any]:
    fields = {"number": number, "hosts": ["here"], "processes": 1, "job": None, "code": code}
    return {"step": at, "tokens": at * STEP, "time": time, "attempt": fields}


def make_run(
    folder: Path,
    overrides: Sequence[str],
    records: Sequence[dict[str, Any]],
    state: str | None = "finished",
    **status: Any,
) -> Path:
    """state: that of status.json; None writes no status.json."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = composed(f"run.name={folder.name}", *overrides)
    save_resolved(config, folder / "config.yaml")
    if state is not None:
        fields = {"state": state, "step": 0, "tokens": 0, "attempt": None, "reason": None, **status}
        (folder / "status.json").write_text(json.dumps(fields))
    return folder


def section_of(*runs: ReadRun) -> Section:
    [found] = sections(runs)
    return found


def read_run(
    settings: dict[str, Any],
    records: Sequence[dict[str, Any]],
    state: str | None = "finished",
    base: tuple[str, ...] = (),
) -> ReadRun:
    """A run as it is read, with recorded FLOPs: without files, a composition of its own, and torch.

    settings: {name: value}, set in the configuration of the overrides `base`.
    """
    config = composed(*base)
    for name, value in settings.items():
        *path, last = name.split(".")
        setattr(reduce(getattr, path, config), last, value)
    status = None if state is None else {"state": state, "reason": None}
    read = collect({"flops": record["tokens"]} | record for record in records)
    return ReadRun(Path("absent") / "-".join(map(str, settings.values())), config, read, status)


GUESSING = {"chance": 0.5, "majority": 0.6, "majority_bits": 0.61, "sampled": 0.52}


def grid(root: Path) -> Path:
    """The runs of `grid_runs` as folders."""
    for settings, records in grid_runs():
        n, seed = settings["sleep.passes"], settings["train.seed"]
        make_run(root / f"n{n}-{seed}", [f"{name}={value}" for name, value in settings.items()], records)
    return root


def grid_runs() -> list[tuple[dict[str, int], list[dict[str, Any]]]]:
    """N in {1, 2} and seeds 0, 1: accuracies 0.5, 0.7 and 0.8, 0.9 at step 10; 0.1 to 0.4 at step 5.

    Returns (settings, records) of each run.
    """
    runs = []
    for n, ends in ((1, (0.5, 0.7)), (2, (0.8, 0.9))):
        for seed, end in enumerate(ends):
            early = (2 * n + seed - 1) / 10
            records = [
                attempt(1, 0, 100.0),
                *(step(number, 3 - number / 10, passes=n) for number in (2, 4, 5)),
                accuracy(5, early, n, **GUESSING),
                *(step(number, 3 - number / 10, passes=n) for number in (6, 8, 10)),
                accuracy(10, end, n, **GUESSING),
            ]
            runs.append(({"sleep.passes": n, "train.seed": seed, "data.seed": seed}, records))
    return runs


def only_section(root: Path) -> Section:
    [found] = sections(find_runs([root])[0])
    return found
