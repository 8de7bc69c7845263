"""The input of a check, its finding and its result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the doctor must start if packages are missing
    from sleeptrain.config.schema import Config

OK, FAILED, SKIPPED = "ok", "failed", "skipped"


@dataclass(frozen=True)
class Case:
    """The input of a check.

    config: settings of the run; None checks the machine alone.
    machines: number of machines of the job.
    folder: temporary folder, shared by all processes of a check.
    rank: index of this process among the processes of the check.
    size: number of these processes.
    """

    config: Config | None
    machines: int
    folder: Path
    rank: int = 0
    size: int = 1


@dataclass(frozen=True)
class Finding:
    """What a check found.

    state: OK, FAILED, or SKIPPED if the check does not apply.
    found: one line for people.
    cure: what to do after a failure.
    details: values for programs.
    """

    state: str
    found: str
    cure: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Result:
    """The finding of the check `name`, and its duration in seconds."""

    name: str
    finding: Finding
    seconds: float


def ok(found: str, **details: Any) -> Finding:
    return Finding(OK, found, details=details)


def failed(found: str, cure: str, **details: Any) -> Finding:
    return Finding(FAILED, found, cure, details)


def skipped(reason: str, **details: Any) -> Finding:
    return Finding(SKIPPED, reason, details=details)
