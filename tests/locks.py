"""Readers of the locks in requirements/ and of the ranges in pyproject.toml."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def lock_lines(lock: Path) -> list[str]:
    lines = (line.partition(" #")[0].strip() for line in lock.read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def pins(name: str) -> dict[str, Requirement]:
    """{package: its pin} of requirements/`name`.txt."""
    found = [Requirement(line) for line in lock_lines(ROOT / "requirements" / f"{name}.txt")]
    return {pin.name: pin for pin in found}


def declared(*extras: str) -> list[Requirement]:
    """The requirements of the package and these extras, with the extras of extras."""
    optional = project()["project"]["optional-dependencies"]
    requirements, waiting = [Requirement(line) for line in project()["project"]["dependencies"]], [*extras]
    while waiting:
        for requirement in map(Requirement, optional[waiting.pop()]):
            if requirement.name == "sleeptrain":
                waiting += requirement.extras
            else:
                requirements.append(requirement)
    return requirements
