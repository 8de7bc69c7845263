"""The project's benchmarks: one module a benchmark, with `run(quick) -> list[Row]` and `METHOD`, how it measures."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Protocol, cast

NAMES = ("checkpoint", "decode", "loader", "memory", "ops", "pipeline", "prepare", "report", "step")


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


class Benchmark(Protocol):
    METHOD: str

    def run(self, quick: bool) -> list[Row]: ...


def load(name: str) -> Benchmark:
    """The benchmark's module; its imports are made only now."""
    return cast(Benchmark, importlib.import_module(f"benchmarks.{name}"))
