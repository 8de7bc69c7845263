"""What a check is given, and what it finds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a doctor must start where packages are missing
    from sleeptrain.config.schema import Config

OK, FAILED, SKIPPED = "ok", "failed", "skipped"


@dataclass(frozen=True)
class Case:
    """config: the run that is asked about; None: the machine alone. machines: of the job that this process is in.

    folder: for files of the checks, the same for all processes of one; gone afterwards. rank, size: this process among
    those that make the check.
    """

    config: Config | None
    machines: int
    folder: Path
    rank: int = 0
    size: int = 1


@dataclass(frozen=True)
class Finding:
    """state: OK, FAILED, or SKIPPED: it does not apply. cure: what to do, where it failed. details: for programs."""

    state: str
    found: str
    cure: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Result:
    """The finding of a check, and how long it took."""

    name: str
    finding: Finding
    seconds: float


def ok(found: str, **details: Any) -> Finding:
    return Finding(OK, found, details=details)


def failed(found: str, cure: str, **details: Any) -> Finding:
    return Finding(FAILED, found, cure, details)


def skipped(why: str, **details: Any) -> Finding:
    return Finding(SKIPPED, why, details=details)
