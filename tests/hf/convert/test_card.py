"""The sleep settings of an export, and its README."""

from __future__ import annotations

import re
from dataclasses import asdict, replace

import pytest

from sleeptrain.config.schema import SleepConfig
from sleeptrain.errors import ConfigError, DataError, UserError
from sleeptrain.hf.convert.card import model_card, read_sleep, sleep_settings, training_facts
from sleeptrain.sleep.curriculum import StepShape
from tests.hf.checkpoints import STATE, run_config
from tests.models import tiny_config

SLEEP = SleepConfig(passes=1, window=64, eviction="sliding", feedback="none", core=[0, 2], when="every")


def test_passes_and_window_are_those_of_the_last_step() -> None:
    written = sleep_settings(SLEEP, StepShape(3, 16, 8))
    assert written == {
        "passes": 3, "window": 16, "eviction": "sliding", "feedback": "none", "core": [0, 2],
        "conv_state": SLEEP.conv_state, "when": "every",
    }  # fmt: skip
    found = asdict(read_sleep({"sleep": written}))
    assert {name: found[name] for name in written} == written


def test_a_stop_rule_is_written_and_read_back() -> None:
    sleep = SleepConfig(passes=1, stop="acceleration", stop_threshold=0.25, min_passes=2)
    written = sleep_settings(sleep, StepShape(3, 16, 8))
    assert (written["stop"], written["stop_threshold"], written["min_passes"]) == ("acceleration", 0.25, 2)
    assert read_sleep({"sleep": written}) == replace(sleep, passes=3, window=16)
    assert sleep_settings(sleep, StepShape(1, 16, 8))["min_passes"] == 1, "the curriculum is below the least passes"
    rows = re.findall(r"^\| `(\w+)` \|", card(sleep=sleep), re.MULTILINE)
    assert rows[-3:] == ["stop", "stop_threshold", "min_passes"]


def test_without_settings_the_defaults_are_written() -> None:
    assert read_sleep({}) == read_sleep({"sleep": None}) == SleepConfig()
    assert sleep_settings(SleepConfig(), StepShape(1, 16, 8))["core"] is None


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (3, "config.json: sleep=3 are no settings of sleep"),
        ({"passes": 2, "depth": 3, "curriculum": []}, "sleep has curriculum, depth, which sleeptrain does not know"),
        ({"passes": "many"}, "config.json: sleep: .*'many'"),
    ],
)
def test_other_settings_are_refused(written: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        read_sleep({"sleep": written})
    assert isinstance(refused.value, ConfigError | DataError)


def card(in_transformers: bool = True, dtype: str = "float32", folder: str = "hf", sleep: SleepConfig = SLEEP) -> str:
    settings = {"model_type": "qwen3_5_text", "dtype": dtype, "sleep": sleep_settings(sleep, StepShape(3, 16, 8))}
    return model_card("small", folder, settings, in_transformers, {"steps": "12"}, "checked: the same logits")


def test_the_card_says_how_to_load_it() -> None:
    assert 'AutoModelForCausalLM.from_pretrained("hf")' in card()
    assert 'SleepForCausalLM.from_pretrained("hf", dtype="bfloat16")' in card(False, "bfloat16")
    assert r'from_pretrained("a\"é")' in card(folder='a"é')


def test_the_card_has_a_row_for_each_setting_and_fact() -> None:
    text = card()
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| .+ \|$", text, re.MULTILINE)
    assert ("passes", "3") in rows and ("window", "16") in rows and ("core", "[0, 2]") in rows and len(rows) == 7
    assert "| steps | 12 |" in text and "checked: the same logits" in text and "a window of 16 tokens" in text
    assert text.startswith("---\nlibrary_name: transformers\n") and "\n# small\n" in text


def test_facts_are_those_of_the_run() -> None:
    config = run_config(tiny_config(), "tokenizer.model")
    facts = training_facts(config, STATE, 12_345)
    assert (facts["parameters"], facts["steps"], facts["tokens"]) == ("12,345", "12", "3,456")
    assert facts["data"] == "books, code" and "begun with" not in facts
    config.run.init_from, config.data.source = "runs/other", "rule110"
    facts = training_facts(config, STATE, 1)
    assert (facts["data"], facts["begun with"]) == ("rule110", "runs/other")
