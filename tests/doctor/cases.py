"""Checks with scripts of a test, and the input of a check."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from sleeptrain.config.compose import compose
from sleeptrain.doctor.checks import CHECKS, Check
from sleeptrain.doctor.examine import examine
from sleeptrain.doctor.finding import Case, Finding, ok


@dataclass(frozen=True)
class Scripted(Check):
    """A check that runs a script. Workers are forks, so any function can be one."""

    script: Callable[[Case], Finding] | None = None

    def load(self) -> Callable[[Case], Finding]:
        assert self.script is not None
        return self.script


def scripted(script: Callable[[Case], Finding], limit: float = 60) -> Scripted:
    return Scripted("", limit, "do this", script)


def alone(folder: Path, *settings: str, machines: int = 1) -> Case:
    return Case(compose(["experiment=rule110", *settings]) if settings else None, machines, folder)


def found(names: Sequence[str], folder: Path, *settings: str) -> dict[str, Finding]:
    """The findings of some checks, which run in processes of their own."""
    return {result.name: result.finding for result in examine(names, alone(folder, *settings))}


def states(findings: Mapping[str, Finding]) -> dict[str, str]:
    return {name: finding.state for name, finding in findings.items()}


def limited(patch: Any, name: str, seconds: float) -> None:
    check = CHECKS[name]
    patch.setitem(CHECKS, name, Check(check.function, seconds, check.cure))


def good(case: Case) -> Finding:
    return ok("fine", devices=0)


def hangs(case: Case) -> Finding:
    while True:
        time.sleep(60)


def assert_ended(pid: int) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return
        except psutil.NoSuchProcess:
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} lives on")
