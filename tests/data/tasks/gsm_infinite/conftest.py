"""Settings of problems that are read from files."""

from __future__ import annotations

from pathlib import Path

import pytest

from sleeptrain.config.schema import GsmInfiniteConfig
from tests.data.tasks.gsm_infinite.made import records, write


@pytest.fixture
def stored(tmp_path: Path) -> GsmInfiniteConfig:
    train, validation = (write(tmp_path / n, r) for n, r in (("t.jsonl", records(0, 12)), ("v.jsonl", records(50, 6))))
    return GsmInfiniteConfig(
        max_ops=3, min_tokens=100, max_tokens=220, train=train, validation=validation, validation_samples=5
    )
