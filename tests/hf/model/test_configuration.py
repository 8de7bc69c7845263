"""Settings of a sleeping model in config.json."""

from __future__ import annotations

import pytest

from sleeptrain.errors import ConfigError
from sleeptrain.hf.model.configuration import SleepPretrainedConfig


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sleep": {"pases": 2}}, "unknown setting sleep.pases; did you mean 'passes'"),
        ({"sleep": {"recompute": "pass"}}, "unknown setting sleep.recompute"),
        ({"sleep": {"passes": "many"}}, "could not be converted to Integer"),
        ({"sleep": {"passes": 0}}, "sleep.passes must be at least 1"),
        ({"sleep": {"eviction": "soft"}}, "sleep.eviction: unknown value 'soft'"),
        ({"model": {"layers": ["attention"]}, "sleep": {"passes": 2}}, "a plain transformer cannot sleep"),
        ({"model": {"dims": 2}}, "'dims' not in 'ModelConfig'"),
    ],
)
def test_settings_are_checked(arguments, message):
    with pytest.raises(ConfigError, match=message):
        SleepPretrainedConfig(**arguments)
