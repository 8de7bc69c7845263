"""The settings of a model and its sleep in config.json, or the reason of their refusal."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sleeptrain.hf.convert.gate_file import write_gate
from tests.hf.convert.folders import change_config, native_folder, refused
from tests.sleep.gates import a_gate

SETTINGS = [
    ("qwen3_5_text", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported for qwen3_5_text, only 'silu'"),
    ("qwen3_5_text", {"attention_bias": True}, "attention_bias=True is not supported"),
    ("qwen3_5_text", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "'linear'"),
    ("qwen3_next", {"num_experts": 4, "mlp_only_layers": [0]}, "no mixture of experts"),
    ("granitemoehybrid", {"num_local_experts": 2}, "num_local_experts=2 is not supported"),
    ("granitemoehybrid", {"mamba_n_groups": 2}, "mamba_n_groups=2 is not supported"),
    ("granitemoehybrid", {"time_step_limit": [0.1, 1.0]}, "time_step_limit"),
    ("qwen3_5_text", {"model_type": "llama"}, "unknown model_type 'llama'; allowed: qwen3_5_text, granite"),
    ("qwen3_5_text", {"model_type": "qwen35"}, "is not understood by transformers"),
    ("qwen3_5_text", {"layer_types": ["linear_attention", "sliding_attention", "linear_attention"]}, "sliding_"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "message"), SETTINGS, ids=[str(c[1])[1:40] for c in SETTINGS])
def test_settings_that_sleeptrain_lacks_are_refused(name: str, changes: dict, message: str, tmp_path: Path):
    native_folder(name, tmp_path / "hf")
    change_config(tmp_path / "hf", **changes)
    error = refused(tmp_path / "hf")
    assert re.search(message, str(error)), error


SLEEPS = [
    ({"passes": 2, "depth": 3}, "config.json: sleep has depth, which sleeptrain does not know"),
    ({"passes": "many"}, "config.json: sleep: .*'many'"),
    ({"core": 3}, "config.json: sleep: "),
    (3, "config.json: sleep=3 are no settings"),
    ([], r"config.json: sleep=\[\] are no settings"),
    ({"passes": 0}, "config.json describes no model .*: sleep.passes must be at least 1, not 0"),
    ({"when": "never"}, "sleep.when: unknown value 'never'"),
    ({"core": [5, 9]}, "sleep.core must be .* not .5, 9."),
    ({"passes": 2, "stop": "gate"}, r"sleep/gate\.safetensors is missing, the gate of sleep\.stop=gate"),
    ({"stop": "gate", "stop_gate": "x"}, "config.json: sleep has stop_gate, which sleeptrain does not know"),
]


@pytest.mark.parametrize(("sleep", "message"), SLEEPS)
def test_sleep_settings_of_another_kind_are_refused(sleep: object, message: str, folder: Path):
    change_config(folder, sleep=sleep)
    assert re.search(message, str(refused(folder)))


MALFORMED: list[tuple[str, dict[str, object], str]] = [
    ("qwen3_5_text", {"hidden_size": "abc"}, "is not understood by transformers: .*hidden_size"),
    ("qwen3_5_text", {"layer_types": ["full_attention"]}, "is not understood by transformers: .*layer"),
    ("qwen3_5_text", {"rope_parameters": [1]}, "is not understood by transformers|is not that of a"),
    ("qwen3_5_text", {"rope_parameters": {"rope_type": "default", "rope_theta": "a"}}, "config.json"),
    ("qwen3_5_text", {"rope_parameters": "default"}, "config.json"),
    ("qwen3_5_text", {"rope_parameters": {"rope_theta": "a", "partial_rotary_factor": "b"}}, "config.json"),
    ("qwen3_5_text", {"vocab_size": None}, "config.json"),
    ("qwen3_5_text", {"eos_token_id": "a"}, "eos_token_id"),
    ("qwen3_5_text", {"eos_token_id": {"a": [1]}}, "eos_token_id"),
    ("qwen3_5_text", {"num_hidden_layers": 1}, "config.json.*(layer_types|num_hidden_layers)"),
    ("qwen3_5_text", {"num_hidden_layers": 400_000}, "num_hidden_layers is or has 400000, outside of 0 to 1024"),
    ("qwen3_5_text", {"layer_types": ["full_attention"] * 400_000}, "layer_types is or has 400000"),
    ("qwen3_5_text", {"head_dim": 2**63}, "config.json.*head_dim"),
    ("qwen3_5_text", {"head_dim": 10**400}, "config.json"),
    ("qwen3_5_text", {"rms_norm_eps": 0.0}, "config.json describes no model .*: model.norm_eps must be greater than 0"),
    ("qwen3_5_text", {"num_attention_heads": 3}, "must be a multiple of model.attention.num_kv_heads"),
    ("qwen3_5_text", {"model_type": ["qwen3_5_text"]}, "names no model_type"),
    (
        "qwen3_5_text",
        {"model_type": "qwen3_5", "text_config": None},
        "is not understood by transformers: a value is missing or of a wrong kind",
    ),
    ("qwen3_5_text", {"model_type": "qwen3_5", "text_config": 3}, "config.json"),
    ("granitemoehybrid", {"time_step_limit": 3}, "config.json"),
    ("olmo_hybrid", {"hidden_size": 0}, "config.json"),
]


@pytest.mark.parametrize(("name", "changes", "message"), MALFORMED, ids=[str(c[1])[1:40] for c in MALFORMED])
def test_malformed_settings_are_refused(name: str, changes: dict, message: str, tmp_path: Path):
    native_folder(name, tmp_path / "hf")
    change_config(tmp_path / "hf", **changes)
    assert re.search(message, str(refused(tmp_path / "hf")))


def test_a_folder_without_a_model_is_refused(tmp_path: Path):
    (tmp_path / "hf").mkdir()
    assert "name the folder of a model as transformers saves it" in str(refused(tmp_path / "hf"))
    (tmp_path / "hf/config.json").write_text("{")
    assert "is not the JSON that it should be" in str(refused(tmp_path / "hf"))
    (tmp_path / "hf/config.json").write_text("{}")
    assert "names no model_type" in str(refused(tmp_path / "hf"))


def test_a_gate_for_fewer_passes_than_the_folder_takes_is_refused(folder: Path):
    write_gate(folder, a_gate())
    change_config(folder, sleep={"passes": 9, "stop": "gate"}, stop_gate_passes=4)
    assert re.search("describes no model .*: sleep.passes=9: the gate .* knows at most 4", str(refused(folder)))
