"""Checks that do what a test says, and what a check is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleeptrain.config.compose import compose
from sleeptrain.doctor.checks import CHECKS, Check
from sleeptrain.doctor.examine import examine
from sleeptrain.doctor.finding import Case, Finding


@dataclass(frozen=True)
class Scripted(Check):
    """Workers are forks, so that the script may be anything."""

    script: Callable[[Case], Finding] | None = None

    def load(self) -> Callable[[Case], Finding]:
        assert self.script is not None
        return self.script


def scripted(script: Callable[[Case], Finding], limit: float = 60) -> Scripted:
    return Scripted("", limit, "do this", script)


def alone(folder: Path, *settings: str, machines: int = 1) -> Case:
    return Case(compose(["experiment=rule110", *settings]) if settings else None, machines, folder)


def found(names: Sequence[str], folder: Path, *settings: str) -> dict[str, Finding]:
    """The findings of some checks, as processes of their own make them."""
    return {result.name: result.finding for result in examine(names, alone(folder, *settings))}


def states(findings: Mapping[str, Finding]) -> dict[str, str]:
    return {name: finding.state for name, finding in findings.items()}


def limited(patch: Any, name: str, seconds: float) -> None:
    check = CHECKS[name]
    patch.setitem(CHECKS, name, Check(check.function, seconds, check.cure))
