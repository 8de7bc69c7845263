"""The task that `data.source` names."""

from __future__ import annotations

import pytest

from sleeptrain.config.schema import DataConfig
from sleeptrain.data.tasks.build import build_task
from sleeptrain.errors import ConfigError


@pytest.mark.parametrize("source", ["rule110", "depo", "gsm_infinite"])
def test_a_task_is_built_by_its_name(source: str) -> None:
    assert build_task(DataConfig(source=source)).name == source


@pytest.mark.parametrize("source", ["shards", "rule30"])
def test_an_unknown_task_is_refused(source: str) -> None:
    with pytest.raises(ConfigError, match=f"^data\\.source='{source}' is unknown: set shards, rule110, depo or gsm"):
        build_task(DataConfig(source=source))
