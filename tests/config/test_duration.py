from __future__ import annotations

import pytest

from sleeptrain.config import load_resolved, save_resolved
from sleeptrain.config.compose import compose
from sleeptrain.config.duration import parse_duration
from sleeptrain.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("3:55:00", 14_100),
        ("0:00:01", 1),
        ("100:00:00", 360_000),
        ("1-12:00:00", 129_600),
        ("90m", 5400),
        ("90 min", 5400),
        ("2.5h", 9000),
        ("45s", 45),
        ("2d", 172_800),
    ],
)
def test_lengths(text: str, seconds: float, tmp_path) -> None:
    assert parse_duration(text) == seconds
    config = compose(["experiment=rule110", f"train.max_time='{text}'"])
    assert config.train.max_time == text
    save_resolved(config, tmp_path / "config.yaml")
    assert load_resolved(tmp_path / "config.yaml") == config, "YAML would read 3:55:00 as a number"


def test_no_quotes_are_needed() -> None:
    assert compose(["experiment=rule110", "train.max_time=3:55:00"]).train.max_time == "3:55:00"
    assert compose(["experiment=rule110", "train.max_time=1-12:00:00"]).train.max_time == "1-12:00:00"


@pytest.mark.parametrize("text", ["", "3:55", "90", "3:60:00", "-1h", "1h30m", "soon", "0:00:00", "0s", "1e3s", "1-2h"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.max_time: .*(write 3:55:00|no time at all)"):
        compose(["experiment=rule110", f"train.max_time='{text}'"])
