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
        ({"sleep": {"passes": 2, "stop": "gate"}}, "sleep.stop=gate: this model holds no gate; export a run with"),
        (
            {"sleep": {"passes": 5, "stop": "gate"}, "stop_gate_passes": 4},
            "sleep.passes=5: the gate .* at most 4",
        ),
        (
            {"sleep": {"stop_gate": "gate.safetensors"}},
            "sleep.stop_gate names a file, .* set it in the run",
        ),
        ({"stop_gate_passes": "many"}, "config.json: stop_gate_passes='many' is no number of passes"),
        ({"stop_gate_passes": -1}, "config.json: stop_gate_passes=-1 is no number of passes"),
        ({"model": {"layers": ["attention"]}, "sleep": {"passes": 2}}, "a plain transformer cannot sleep"),
        ({"model": {"dims": 2}}, "'dims' not in 'ModelConfig'"),
    ],
)
def test_settings_are_checked(arguments, message):
    with pytest.raises(ConfigError, match=message):
        SleepPretrainedConfig(**arguments)


def test_a_call_takes_no_more_passes_than_the_gate_knows():
    config = SleepPretrainedConfig(sleep={"passes": 2, "stop": "gate"}, stop_gate_passes=4)
    assert config.sleep_settings(passes=4).passes == 4
    with pytest.raises(ConfigError, match=r"sleep\.passes=5: the gate of sleep\.stop=gate knows at most 4"):
        config.sleep_settings(passes=5)
