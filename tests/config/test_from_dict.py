"""Settings from a file of a stranger are checked, and read as data only."""

from __future__ import annotations

import pytest

from sleeptrain.config.from_dict import from_dict
from sleeptrain.config.schema import ModelConfig, SleepConfig
from sleeptrain.errors import ConfigError

SECRET = "hush-4711"


@pytest.fixture(autouse=True)
def _secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLEEPTRAIN_TEST_KEY", SECRET)


def test_missing_settings_are_the_defaults_and_sections_are_read() -> None:
    found = from_dict(ModelConfig, {"dim": 8, "layers": ["jet"], "jet": {"num_heads": 2}}, "config.json")
    assert (found.dim, found.layers, found.jet.num_heads) == (8, ["jet"], 2)
    assert (found.ffn_dim, found.jet.conv_size) == (ModelConfig().ffn_dim, ModelConfig().jet.conv_size)


@pytest.mark.parametrize(("values", "word"), [({"pases": 2}, "pases"), ({"passes": "many"}, "passes")])
def test_unknown_settings_and_wrong_types_are_refused_in_a_line(values: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        from_dict(SleepConfig, values, "config.json")
    message = str(refusal.value)
    assert message.startswith("config.json: ") and word in message and "\n" not in message


def test_settings_of_a_models_folder_are_data() -> None:
    assert (
        from_dict(ModelConfig, {"norm": "${oc.env:SLEEPTRAIN_TEST_KEY}"}, "c").norm == "${oc.env:SLEEPTRAIN_TEST_KEY}"
    )
    with pytest.raises(ConfigError) as refusal:
        from_dict(ModelConfig, {"dim": "${oc.env:SLEEPTRAIN_TEST_KEY}"}, "config.json")
    assert SECRET not in str(refusal.value)
