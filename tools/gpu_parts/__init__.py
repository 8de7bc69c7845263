"""The parts of `tools/gpu_report.py`. Each runs in a process of its own, so that no part takes the others with it.

A module of a part has `run` and `lines`. `run` does the work and notes results on the way: what was noted is reported
even if the process is killed. `lines` makes Markdown of the results.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

# Called with results, which are merged into those of the part.
Note = Callable[[Mapping[str, Any]], None]


class MissingError(Exception):
    """The part needs something that this machine lacks. The message says what."""


@dataclass(frozen=True)
class Options:
    """What a part is called with.

    device: `cuda` or `cpu`. seconds: after which the part is killed. subject: what `Part.subject` says.
    """

    device: str
    seconds: float
    subject: str = ""

    @property
    def small(self) -> bool:
        """Sizes that a CPU runs in seconds."""
        return self.device == "cpu"


@dataclass(frozen=True)
class Part:
    """A part of the report.

    name: in the report. module: in this package. seconds: of the budget; what a part leaves over the next ones get.
    subject: what it is about, where several parts share a module.
    """

    name: str
    module: str
    seconds: float
    subject: str = ""


# In the order of their worth, the quick ones first: a report that is cut off has the beginning. 585 seconds in all.
PARTS = (
    Part("environment", "environment", 25),
    Part("attention", "attention", 40),
    Part("speed of hybrid_2b", "speed", 130, "hybrid_2b"),
    Part("speed of ouro_1_4b_jet", "speed", 110, "ouro_1_4b_jet"),
    Part("kernels", "suites", 110, "kernels"),
    Part("tests", "suites", 60, "gpu"),
    Part("rounds", "rounds", 50, "hybrid_2b"),
    Part("flash-linear-attention's model", "peer", 60, "hybrid_2b"),
)


class Module(Protocol):
    def run(self, options: Options, note: Note) -> list[str]:
        """Returns what is wrong. Raises MissingError; any other exception is a failure of the part."""

    def lines(self, result: dict[str, Any]) -> list[str]:
        """Lines of Markdown for what was noted."""


def load(name: str) -> Module:
    return cast(Module, importlib.import_module(f"gpu_parts.{name}"))
