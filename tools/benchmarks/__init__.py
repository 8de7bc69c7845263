"""The project's benchmarks: one module a benchmark, each with `run(quick: bool) -> list[Row]`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

MODULES = {"loader": "benchmarks.loader", "ops": "benchmarks.ops", "pipeline": "benchmarks.pipeline", "step": "benchmarks.step"}


@dataclass(frozen=True)
class Row:
    """One measured number beside its goal; `better` says on which side of the goal it should lie."""

    name: str
    value: float
    unit: str
    goal: float | None = None
    better: str = "higher"  # higher | lower

    @property
    def ok(self) -> bool:
        if self.goal is None:
            return True
        return self.value >= self.goal if self.better == "higher" else self.value <= self.goal


def load(name: str) -> Callable[[bool], list[Row]]:
    """The benchmark's `run`; its imports are made only now."""
    return importlib.import_module(MODULES[name]).run
