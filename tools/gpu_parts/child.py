"""The process of one part: it runs the part and keeps its outcome in a file that is always whole."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_parts import MissingError, Module, Options
from sleeptrain.files import write_whole


@dataclass
class Outcome:
    """status: running | ok | failed | missing. reason: why it is not ok. result: what the part has noted."""

    file: Path
    status: str = "running"
    reason: str = ""
    result: dict[str, Any] = field(default_factory=dict)
    start: float = field(default_factory=time.monotonic)

    def note(self, results: Mapping[str, Any]) -> None:
        self.result |= results
        self.save()

    def save(self) -> None:
        seconds = round(time.monotonic() - self.start, 1)
        fields = {"status": self.status, "reason": self.reason, "seconds": seconds, "result": self.result}
        write_whole(self.file, json.dumps(fields).encode())


def run_part(module: Module, options: Options, file: Path) -> None:
    """Run a part. Its outcome is in `file`, also while it runs."""
    outcome = Outcome(file)
    outcome.save()
    try:
        problems = module.run(options, outcome.note)
        outcome.status, outcome.reason = ("failed", "; ".join(problems)) if problems else ("ok", "")
    except MissingError as missing:
        outcome.status, outcome.reason = "missing", str(missing)
    except Exception as error:
        traceback.print_exc()  # into the part's log
        outcome.status, outcome.reason = "failed", f"{type(error).__name__}: {error}".splitlines()[0][:500]
    outcome.save()
