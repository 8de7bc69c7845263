"""The arguments of `from_pretrained` besides a folder, and their refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sleeptrain.errors import ConfigError, DataError, UserError
from sleeptrain.hf.convert.exporting import export
from sleeptrain.hf.convert.gate_file import GATE_FILE, write_gate
from sleeptrain.hf.families import FAMILIES
from sleeptrain.hf.model.configuration import SleepPretrainedConfig
from sleeptrain.hf.model.modeling import SleepForCausalLM
from tests.hf.checkpoints import save_checkpoint
from tests.hf.models import disturbed, granite, native
from tests.models import tiny_config
from tests.sleep.gates import a_gate


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An export of a family, with sleep settings."""
    place = tmp_path / "native"
    place.mkdir()
    native(FAMILIES["qwen3_5_text"], disturbed(tiny_config(["attention", "gated_deltanet"])), place)
    written = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(
        json.dumps(written | {"sleep": {"passes": 3, "window": 4, "when": "unlabelled"}})
    )
    return place


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_dtypes(folder: Path, dtype: Any, name: str):
    model = SleepForCausalLM.from_pretrained(folder, **{name: dtype})
    narrow = {n for n, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert {n for n, _ in model.named_parameters()} - narrow == {
        n for n in model.state_dict() if n.endswith(("A_log", "dt_bias"))
    }
    assert SleepForCausalLM.from_pretrained(folder, **{name: "auto"}).dtype == torch.float32
    assert SleepForCausalLM.from_pretrained(folder, dtype=torch.float64, torch_dtype="bfloat16").dtype == torch.float64


@pytest.mark.parametrize("device_map", ["cpu", torch.device("cpu"), {"": "cpu"}, None])
def test_one_device(folder: Path, device_map: Any):
    assert SleepForCausalLM.from_pretrained(folder, device_map=device_map).device.type == "cpu"


def test_an_argument_sleep_replaces_settings_of_the_folder(folder: Path, tmp_path: Path):
    for place, load in ((folder, SleepForCausalLM), (tmp_path / "saved", AutoModelForCausalLM)):
        for passes in (5, 3):
            model = load.from_pretrained(place, sleep={"passes": passes})
            sleep = model.config.sleep_settings()
            assert (sleep.passes, sleep.window, sleep.when) == (passes, 4, "unlabelled")
        model.save_pretrained(tmp_path / "saved")
    model = SleepForCausalLM.from_pretrained(folder, model={"attention": {"rope_theta": 5.0}, "norm_eps": 0.1})
    assert model.config.model_config().attention.num_heads == 4
    assert (model.config.model_config().attention.rope_theta, model.config.model_config().norm_eps) == (5.0, 0.1)
    for wrong, message in (({"pases": 2}, "unknown setting sleep.pases"), (4, "sleep=4: give its settings")):
        with pytest.raises(ConfigError, match=message):
            SleepForCausalLM.from_pretrained(folder, sleep=wrong)


def test_an_argument_config_is_used(folder: Path, tmp_path: Path):
    config = SleepPretrainedConfig.from_pretrained(folder, sleep={"passes": 2})
    model = SleepForCausalLM.from_pretrained(folder, config=config)
    assert model.config.sleep["passes"] == 2
    model.config.sleep["passes"] = 7
    assert config.sleep["passes"] == 2
    config.save_pretrained(tmp_path / "config")
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, trust_remote_code=False, revision="main")
    assert type(model) is SleepForCausalLM
    assert SleepForCausalLM.from_pretrained(folder, config=tmp_path / "config").config.sleep["passes"] == 2
    assert SleepForCausalLM.from_pretrained(folder, use_cache=False).config.use_cache is False


def test_loading_info(folder: Path, tmp_path: Path):
    model, info = SleepForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not model.training
    model.save_pretrained(tmp_path / "saved")
    _, theirs = SleepForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert info == theirs


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_an_exported_gate_is_held_in_fp32_and_saved_with_the_weights(folder: Path, tmp_path: Path, dtype: str):
    write_gate(folder, a_gate())
    written = json.loads((folder / "config.json").read_text())
    sleep = {"passes": 3, "window": 4, "stop": "gate", "stop_threshold": 0.1}
    (folder / "config.json").write_text(json.dumps(written | {"sleep": sleep, "stop_gate_passes": 4}))
    SleepForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(tmp_path / "saved")
    again = SleepForCausalLM.from_pretrained(tmp_path / "saved", device_map="cpu")
    assert again.stop_gate is not None and str(again.dtype) == f"torch.{dtype}"
    for found, expected in zip(again.stop_gate.parameters(), a_gate().parameters(), strict=True):
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
    (folder / GATE_FILE).unlink()
    with pytest.raises(DataError, match=r"gate\.safetensors is missing, the gate of sleep\.stop=gate in config\.json"):
        SleepForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("mixer", ["gated_deltanet", "mamba2"])
def test_an_export_without_attention_generates_with_a_cache(mixer: str, tmp_path: Path):
    """Transformers' own classes of such models have no cache, and the folder says so."""
    config = granite(layers=[mixer] * 2) if mixer == "mamba2" else tiny_config([mixer] * 2)
    export(save_checkpoint(tmp_path / "c", disturbed(config)), tmp_path / "hf", check_tokens=16)
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["use_cache"] is False
    model, lengths = SleepForCausalLM.from_pretrained(tmp_path / "hf"), []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 17}
    model.generate(torch.tensor([[1, 2, 3]]), **options)
    assert lengths == [3, 1, 1, 1]
    model = SleepForCausalLM.from_pretrained(tmp_path / "hf", use_cache=False)
    assert model.generation_config.use_cache is False


@pytest.mark.parametrize("tied", [True, False])
def test_the_text_model_of_a_model_that_sees_images(tied: bool, tmp_path: Path):
    """The key for tied embeddings is at the top, not in `text_config`."""
    ours = disturbed(tiny_config(["attention", "gated_deltanet"], tie_embeddings=tied))
    theirs = native(FAMILIES["qwen3_5_text"], ours, tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())
    assert text.pop("tie_word_embeddings") is tied
    outer = {"model_type": "qwen3_5", "text_config": text, "tie_word_embeddings": tied}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    weights = load_file(tmp_path / "model.safetensors")
    renamed = {name.replace("model.", "model.language_model.", 1): w for name, w in weights.items()}
    save_file(renamed | {"model.visual.proj.bias": torch.zeros(4)}, tmp_path / "model.safetensors", {"format": "pt"})
    model, ids = SleepForCausalLM.from_pretrained(tmp_path), torch.tensor([[1, 2, 3, 4, 5]])
    assert model.config.model_config().tie_embeddings is tied
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtpye": "bfloat16"}, "does not know dtpye"),
        ({"quantization_config": {"load_in_8bit": True}}, "quantization_config: weights are loaded as they are"),
        ({"dtype": "int8"}, "dtype=int8: give 'auto' or a floating point type"),
        ({"torch_dtype": "halb"}, "dtype=halb: give 'auto'"),
        ({"device_map": "auto"}, "device_map=auto: the model stands on one device"),
        ({"device_map": {"model": "cpu", "head": "cpu"}}, "the model stands on one device"),
        ({"device_map": "gpu"}, "device_map=gpu is no device that torch knows"),
        ({"device_map": "meta"}, "device_map=meta: the model runs on cpu and cuda"),
        ({"device_map": {"": f"cuda:{torch.cuda.device_count()}"}}, "torch sees .* here; use cpu"),
        ({"config": {"passes": 2}}, "config is a dict"),
        ({"config": SleepPretrainedConfig(model={"vocab_size": 17}), "sleep": {"passes": 2}}, "does not know sleep"),
    ],
)
def test_unknown_arguments_are_refused(folder: Path, arguments: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        SleepForCausalLM.from_pretrained(folder, **arguments)


GENERATION = [b"", b"{", b"[]", b"\xff", b'{"eos_token_id": "a"}', b'{"max_new_tokens": -3}', b"[" * 100_000]


@pytest.mark.parametrize("content", GENERATION, ids=range(len(GENERATION)))
def test_a_damaged_generation_config_is_refused_in_a_line(folder: Path, tmp_path: Path, content: bytes):
    SleepForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    for place in (folder, tmp_path / "saved"):
        (place / "generation_config.json").write_bytes(content)
        with pytest.raises(DataError, match=r"generation_config\.json") as refusal:
            SleepForCausalLM.from_pretrained(place)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "changes",
    [{"eos_token_id": "a"}, {"num_hidden_layers": 1}, {"head_dim": 2**63},
     {"layer_types": ["full_attention"] * 400_000},
     {"rope_parameters": "a"}, {"rope_parameters": {"rope_theta": "a"}}, {"vocab_size": "a"}],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_values_of_a_wrong_kind_are_refused_before_a_tensor_is_read(
    folder: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | changes))
    monkeypatch.setattr("sleeptrain.hf.model.load.native_weights", None)
    with pytest.raises(UserError, match=rf"config\.json|{next(iter(changes))}") as refusal:
        SleepForCausalLM.from_pretrained(folder)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("metadata", [None, 3, "absent"])
def test_an_index_without_metadata_is_refused(folder: Path, tmp_path: Path, metadata: object):
    """Transformers requires metadata."""
    place = tmp_path / "saved"
    SleepForCausalLM.from_pretrained(folder).save_pretrained(place, max_shard_size="4KB")
    path = place / "model.safetensors.index.json"
    index = json.loads(path.read_text()) | {"metadata": metadata}
    if metadata == "absent":
        del index["metadata"]
    path.write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"index\.json has no metadata"):
        SleepForCausalLM.from_pretrained(place)


def test_tensors_of_another_shape_are_refused_in_a_line(folder: Path, tmp_path: Path):
    place = tmp_path / "saved"
    SleepForCausalLM.from_pretrained(folder).save_pretrained(place)
    written = json.loads((place / "config.json").read_text())
    written["model"]["ffn_dim"] *= 2
    (place / "config.json").write_text(json.dumps(written))
    with pytest.raises(DataError, match=r"saved: \d+ mismatched keys \(") as refusal:
        SleepForCausalLM.from_pretrained(place)
    assert "\n" not in str(refusal.value)
