"""A stranger's `config.json` is refused before transformers reads it, where that would cost too much."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sleeptrain.errors import ConfigError, DataError
from sleeptrain.hf.convert.config_file import check_amounts, read_config, understanding

PATH = Path("config.json")


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"num_hidden_layers": 400_000}, "num_hidden_layers is or has 400000, outside of 0 to 1024"),
        ({"layer_types": ["full_attention"] * 400_000}, "layer_types is or has 400000, outside"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"num_hidden_layers": 1e300}, "num_hidden_layers"),
        ({"num_hidden_layers": float("nan")}, "num_hidden_layers"),
        ({"num_labels": 2**40}, "num_labels"),
        ({"stop_gate_passes": 2**40}, "stop_gate_passes"),
        ({"text_config": {"num_hidden_layers": 2**63}}, "num_hidden_layers"),
        ({"model": {"layers": ["attention"] * 2000}}, "layers is or has 2000"),
        ({"text_config": 3}, "text_config is no object"),
    ],
)
def test_values_that_no_model_has_are_refused_by_name(tmp_path: Path, settings: dict[str, Any], word: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_5_text"} | settings))
    with pytest.raises(DataError, match=f"config.json: {word}"):
        read_config(tmp_path)


def test_values_that_a_model_may_have_are_read(tmp_path: Path) -> None:
    written = {"model_type": "x", "num_hidden_layers": 1024, "layer_types": ["a"] * 1024, "text_config": None}
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert read_config(tmp_path) == written
    check_amounts(PATH, {"layer_types": None, "num_hidden_layers": 0, "vision_config": {"layers": {}}})


@pytest.mark.parametrize("model_type", [None, 3, ["x"]])
def test_a_model_without_a_type_is_refused(tmp_path: Path, model_type: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(DataError, match="names no model_type; name the folder of a model"):
        read_config(tmp_path)


def test_errors_of_packages_become_a_line() -> None:
    with (
        pytest.raises(DataError, match=r"^config.json is not understood: .*\(KeyError: 'a'\); name the folder"),
        understanding(PATH),
    ):
        raise KeyError("a")
    with pytest.raises(DataError) as refusal, understanding(PATH):
        raise ValueError("one\n\n  two")
    assert "(ValueError: one two)" in str(refusal.value)
    with pytest.raises(ConfigError, match=r"^ours$"), understanding(PATH):
        raise ConfigError("ours")
    with pytest.raises(KeyboardInterrupt), understanding(PATH):
        raise KeyboardInterrupt
