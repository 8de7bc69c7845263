"""`changes.jsonl` in the run folder: what was changed in a run's settings, and from which step on.

`config.yaml` holds the newest settings; read backwards from it, the changes give those of any attempt.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from sleeptrain.files import write_whole

FILE = "changes.jsonl"


def keep_changes(folder: Path, attempt: int, step: int, changes: Sequence[str]) -> None:
    """Adds a line, whole or not at all: {"attempt": 3, "step": 200, "changes": ["optim.muon_lr: 0.002 -> 0.01"]}.

    The attempt goes on from `step`: steps after it were made with the new settings.
    """
    path = folder / FILE
    before = path.read_bytes() if path.exists() else b""
    line = json.dumps({"attempt": attempt, "step": step, "changes": list(changes)})
    write_whole(path, before + line.encode() + b"\n")
