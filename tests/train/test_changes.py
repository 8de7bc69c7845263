"""The file of changed settings: a line for each attempt that changed some."""

from __future__ import annotations

import json
from pathlib import Path

from sleeptrain.train.changes import FILE, keep_changes


def test_each_attempt_adds_a_line(tmp_path: Path) -> None:
    first, second = ["optim.muon_lr: 0.002 -> 0.01"], ["run.name: a -> ü", "train.tokens: 1 -> 2"]
    keep_changes(tmp_path, 2, 100, first)
    keep_changes(tmp_path, 5, 300, tuple(second))
    lines = (tmp_path / FILE).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"attempt": 2, "step": 100, "changes": first},
        {"attempt": 5, "step": 300, "changes": second},
    ]
    assert [path.name for path in tmp_path.iterdir()] == [FILE], "nothing is left of the writing"
