"""The project's benchmarks. Each is a module with `run(quick) -> list[Row]` and `METHOD`, the method of measuring."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Protocol, cast

NAMES = (
    "checkpoint",
    "decode",
    "host",
    "loader",
    "memory",
    "ops",
    "pipeline",
    "prepare",
    "report",
    "rounds",
    "scale",
    "step",
)


@dataclass(frozen=True)
class Row:
    """A measured number and its goal.

    goal: None: it has none. better: `higher` or `lower`, the good side of the goal.
    """

    name: str
    value: float
    unit: str
    goal: float | None = None
    better: str = "higher"

    @property
    def ok(self) -> bool:
        if self.goal is None:
            return True
        return self.value >= self.goal if self.better == "higher" else self.value <= self.goal


class Benchmark(Protocol):
    METHOD: str

    def run(self, quick: bool) -> list[Row]: ...


def load(name: str) -> Benchmark:
    """Import the module of a benchmark, with the packages that it needs."""
    return cast(Benchmark, importlib.import_module(f"benchmarks.{name}"))
