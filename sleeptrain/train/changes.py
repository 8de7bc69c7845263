"""`changes.jsonl` in the run folder: the changes of a run's settings, each with the step from which it holds.

`config.yaml` holds the newest settings; undoing the changes from the last to the first gives those of each attempt.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from sleeptrain.files import write_whole

FILE = "changes.jsonl"


def keep_changes(folder: Path, attempt: int, step: int, changes: Sequence[str]) -> None:
    """Append a line atomically: {"attempt": 3, "step": 200, "changes": ["optim.muon_lr: 0.002 -> 0.01"]}.

    The attempt goes on from `step`: steps after it use the new settings.
    """
    path = folder / FILE
    lines = path.read_bytes() if path.exists() else b""
    line = json.dumps({"attempt": attempt, "step": step, "changes": list(changes)})
    write_whole(path, lines + line.encode() + b"\n")
