"""Exports: there and back bit for bit, the contents of the folder, refusals, and memory."""

from __future__ import annotations

import dataclasses
import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.live_bytes import LiveBytes
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sleeptrain.checkpoint.folder import find_damage
from sleeptrain.checkpoint.read import TensorFiles
from sleeptrain.cli import main
from sleeptrain.config import load_resolved
from sleeptrain.config.schema import GatedDeltaNetConfig, ModelConfig, ShardSource
from sleeptrain.data.shards import TokenShards, write_shards
from sleeptrain.data.tokenizer import load_tokenizer, train_tokenizer
from sleeptrain.errors import ConfigError, DataError
from sleeptrain.hf.convert.exporting import export, write_family_weights
from sleeptrain.hf.convert.importing import import_folder, write_checkpoint_weights
from sleeptrain.hf.convert.weight_files import WeightFiles
from sleeptrain.hf.families import family_of
from sleeptrain.hf.model.configuration import sleep_dict
from sleeptrain.hf.model.modeling import SleepForCausalLM
from sleeptrain.model.hybrid import Hybrid
from tests.checkpoint.test_folder import flip
from tests.data.test_hf_tokenizer import BOS, EOS, OTHER
from tests.data.test_hf_tokenizer import make as make_tokenizer
from tests.data.texts import make_texts
from tests.hf.checkpoints import run_config, save_checkpoint, save_half, stopping_config, weights_of
from tests.hf.models import MODELS, QUICK_OR_SLOW, disturbed, granite
from tests.hf.sleeping import padded
from tests.models import tiny_config
from tests.parallel.processes import run_ranks
from tests.sleep.gates import gated_settings
from tests.sleep.trained import texts, trained_logits

SLEEP = {
    "passes": 3, "window": 16, "eviction": "hard", "feedback": "none", "core": [0, 2], "conv_state": "restart",
    "when": "every",
}  # fmt: skip


@pytest.mark.parametrize(("model_type", "config"), QUICK_OR_SLOW)
def test_an_export_is_imported_bit_for_bit(model_type: str, config: ModelConfig, tmp_path: Path):
    ours = disturbed(config)
    checkpoint = save_checkpoint(tmp_path / "step-00000012", ours)
    result = export(checkpoint, tmp_path / "hf", model_type, check_tokens=16)
    assert result.num_parameters == sum(p.numel() for p in ours.parameters())
    back = import_folder(tmp_path / "hf", tmp_path / "back", check_tokens=16)
    assert (back.model_type, list(back.left_out)) == (model_type, [])
    found = weights_of(tmp_path / "back")
    assert found.keys() == dict(ours.named_parameters()).keys()
    assert all(torch.equal(found[name], p) for name, p in ours.named_parameters())
    resolved = load_resolved(tmp_path / "back/config.yaml")
    assert resolved.model == back.config
    passes = 1 if set(config.layers) == {"attention"} else 3
    assert {key: getattr(resolved.sleep, key) for key in SLEEP} == SLEEP | {"passes": passes}


@pytest.mark.parametrize("stop", ["change", "acceleration"])
def test_a_stop_rule_goes_there_and_back(stop: str, tmp_path: Path):
    ours = disturbed(MODELS["qwen3_5_text"][1])
    config = stopping_config(ours.config, stop=stop)
    export(save_checkpoint(tmp_path / "c", ours, config), tmp_path / "hf", check_tokens=16)
    model = SleepForCausalLM.from_pretrained(tmp_path / "hf")
    assert sleep_dict(model.config.sleep_settings()) == sleep_dict(config.sleep)
    import_folder(tmp_path / "hf", tmp_path / "back", check_tokens=16)
    assert load_resolved(tmp_path / "back/config.yaml").sleep == config.sleep


def test_an_export_may_follow_another_stop_rule_than_its_run(tmp_path: Path):
    ours = disturbed(MODELS["qwen3_5_text"][1])
    config = stopping_config(ours.config, stop="change")
    checkpoint = save_checkpoint(tmp_path / "c", ours, run_config(ours.config))
    rule = {name: getattr(config.sleep, name) for name in ("stop", "stop_threshold", "min_passes")}
    export(checkpoint, tmp_path / "hf", check_tokens=16, stop=rule)
    exported = SleepForCausalLM.from_pretrained(tmp_path / "hf").config.sleep_settings()
    assert {name: getattr(exported, name) for name in rule} == rule


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"stop": "gate", "feedback": "features"}, r"sleep\.stop=gate needs sleep\.stop_gate"),
        ({"stop": "acceleration"}, r"sleep\.stop=acceleration reads features .* sleep\.feedback=none"),
        ({"stop": "change", "min_passes": 99}, r"sleep\.min_passes \(99\) is more than"),
    ],
)
def test_a_stop_rule_that_cannot_be_followed_is_refused(rule: dict[str, Any], message: str, tmp_path: Path):
    checkpoint = save_checkpoint(tmp_path / "c", disturbed(MODELS["qwen3_5_text"][1]))
    with pytest.raises(ConfigError, match=message):
        export(checkpoint, tmp_path / "hf", check_tokens=16, stop=rule)
    assert not (tmp_path / "hf").exists()


def test_a_gate_goes_there_and_back_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ours, rows = disturbed(MODELS["qwen3_5_text"][1]), texts([13, 9, 18, 16])
    sleep = gated_settings(ours.double(), rows, tmp_path / "gate.safetensors")
    bits = (tmp_path / "gate.safetensors").read_bytes()
    config = run_config(ours.float().config)
    config.sleep = sleep
    export(save_checkpoint(tmp_path / "c", ours, config), tmp_path / "hf", check_tokens=16)
    assert [path.name for path in (tmp_path / "hf").glob("*.safetensors")] == ["model.safetensors"]
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "hf")).__module__.startswith("transformers.models.")
    monkeypatch.chdir(tmp_path)
    import_folder(Path("hf"), Path("back"), check_tokens=16)
    (tmp_path / "gate.safetensors").unlink()
    model = SleepForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float64)
    back = load_resolved(tmp_path / "back/config.yaml").sleep
    assert Path(back.stop_gate).is_absolute() and Path(back.stop_gate).read_bytes() == bits
    assert dataclasses.replace(back, stop_gate="") == dataclasses.replace(sleep, stop_gate="")
    assert find_damage(tmp_path / "back") is None
    with torch.no_grad():
        logits = model(**padded(rows, "right")).logits
    for b, expected in enumerate(trained_logits(ours.double(), rows, back)):
        torch.testing.assert_close(logits[b, : len(expected)], expected, rtol=1e-9, atol=1e-10)


def test_a_run_whose_gate_is_missing_is_not_exported(tmp_path: Path):
    ours = disturbed(MODELS["qwen3_5_text"][1])
    config = stopping_config(ours.config, stop="gate", stop_gate=str(tmp_path / "absent"))
    checkpoint = save_checkpoint(tmp_path / "c", ours, config)
    with pytest.raises(ConfigError, match=r"sleep\.stop_gate=.*absent is no gate that can be read .*--fit-gate"):
        export(checkpoint, tmp_path / "hf", check_tokens=16)
    assert not (tmp_path / "hf").exists()


def test_the_folder_needs_no_code_of_sleeptrain(tmp_path: Path):
    export(save_checkpoint(tmp_path / "c", disturbed(MODELS["qwen3_5_text"][1])), tmp_path / "hf", check_tokens=16)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(theirs).__module__.startswith("transformers.models.qwen3_5.")
    assert theirs.config.sleep == SLEEP
    assert not any(path.suffix == ".py" for path in (tmp_path / "hf").iterdir())
    card = (tmp_path / "hf/README.md").read_text()
    assert "| `passes` | 3 |" in card and "| tokens | 3,456 |" in card and "| data | rule110 |" in card
    for path in (tmp_path / "hf").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "hf/config.json").stat().st_mode), path


@pytest.mark.parametrize("name", ["qwen3_5_text", "granitemoehybrid"])
def test_half_precision_keeps_decays_wide(name: str, tmp_path: Path):
    model_type, config = MODELS[name]
    ours = disturbed(config)
    export(save_checkpoint(tmp_path / "c", ours), tmp_path / "hf", dtype="bfloat16", check_tokens=16)
    found = load_file(tmp_path / "hf/model.safetensors")
    expected = dict(family_of(model_type).to_theirs(config, dict(ours.named_parameters()).__getitem__))
    assert found.keys() == expected.keys()
    wide = {name for name in found if name.endswith(("A_log", "dt_bias", ".D"))}
    assert wide
    for key, tensor in found.items():
        assert torch.equal(tensor, expected[key].to(torch.float32 if key in wide else torch.bfloat16)), key
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").dtype == torch.bfloat16
    import_folder(tmp_path / "hf", tmp_path / "back", check_tokens=16)
    for key, tensor in weights_of(tmp_path / "back").items():
        narrow = not key.endswith(("A_log", "dt_bias", ".D"))
        mine = ours.get_parameter(key)
        assert torch.equal(tensor, mine.to(torch.bfloat16).float() if narrow else mine), key


def test_the_tokenizer_is_exported(tmp_path: Path):
    text = "the windows of a model that sleeps are read again and again " * 20
    tokenizer = train_tokenizer([text], 300, tmp_path / "tokenizer.model")
    model = disturbed(dataclasses.replace(tiny_config(["gated_deltanet", "attention"]), vocab_size=304))
    config = run_config(model.config, str(tmp_path / "tokenizer.model"))
    checkpoint = save_checkpoint(tmp_path / "c", model, config)
    result = export(checkpoint, tmp_path / "hf", check_tokens=16)
    assert result.tokenizer and result.texts == 0
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(text)
    assert theirs(text).input_ids == [tokenizer.bos_id, *tokenizer.encode(text)]
    assert theirs.decode(tokenizer.encode(text)) == text
    for file in ("config.json", "generation_config.json"):
        settings = json.loads((tmp_path / "hf" / file).read_bytes())
        assert (settings["bos_token_id"], settings["eos_token_id"]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert import_folder(tmp_path / "hf", tmp_path / "back", check_tokens=16).tokenizer
    assert "| data | books, code |" in (tmp_path / "hf/README.md").read_text()


@pytest.mark.parametrize("bos", [None, "", OTHER])
def test_a_copied_tokenizer_begins_a_text_as_the_runs_data_does(bos: str | None, tmp_path: Path):
    """The tokenizer names a BOS and adds none. Data begins with it, unless an option says otherwise.

    bos: the argument of `tools/prepare.py --bos-token`, or None without it.
    """
    texts = make_texts(12)
    of_model = make_tokenizer(tmp_path / "model", {"bos_token": BOS, "eos_token": EOS}, post_processor=None)
    tokenizer = load_tokenizer(of_model, bos_token=bos)
    data = tmp_path / "data"
    write_shards(data / "train", texts, tokenizer, "train")
    for name, content in tokenizer.files.items():
        (data / name).write_bytes(content)
    model = disturbed(dataclasses.replace(tiny_config(["gated_deltanet"]), vocab_size=tokenizer.vocab_size))
    config = run_config(model.config, str(data))
    config.data.shards.sources = [ShardSource("a", str(data / "train"))]
    result = export(save_checkpoint(tmp_path / "c", model, config), tmp_path / "hf", check_tokens=16)
    assert result.texts == len(texts)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    shards = TokenShards(data / "train")
    stored = [shards.document(0, index).tolist() for index in range(len(texts))]
    assert [[*theirs(text).input_ids, theirs.eos_token_id] for text in texts] == stored
    for file in ("config.json", "generation_config.json"):
        settings = json.loads((tmp_path / "hf" / file).read_bytes())
        assert (settings["bos_token_id"], settings["eos_token_id"]) == (theirs.bos_token_id, theirs.eos_token_id)
        assert settings["bos_token_id"] == tokenizer.bos_id


def test_a_tokenizer_that_is_not_the_models_is_refused(tmp_path: Path):
    train_tokenizer(["text of few words " * 50], 290, tmp_path / "tokenizer.model")
    model = disturbed(MODELS["qwen3_5_text"][1])
    checkpoint = save_checkpoint(tmp_path / "c", model, run_config(model.config, str(tmp_path / "tokenizer.model")))
    with pytest.raises(DataError, match="has 290 ids, the model 17: it is another model's"):
        export(checkpoint, tmp_path / "hf")
    lost = save_checkpoint(tmp_path / "d", model, run_config(model.config, str(tmp_path / "lost.model")))
    with pytest.raises(DataError, match=r"lost\.model.*name it with --tokenizer, or use --no-tokenizer"):
        export(lost, tmp_path / "hf")
    assert not export(lost, tmp_path / "hf", with_tokenizer=False, check_tokens=16).tokenizer


def test_memory_is_that_of_a_shard(tmp_path: Path):
    """The memory of an export and of an import does not grow with the model."""
    config = ModelConfig(
        vocab_size=64, dim=128, ffn_dim=256, layers=["gated_deltanet"] * 12,
        gated_deltanet=GatedDeltaNetConfig(4, 4, 32, 32),
    )  # fmt: skip
    ours, family, limit = Hybrid(config), family_of("qwen3_next"), 1_000_000
    ours.init_weights(0)
    checkpoint = TensorFiles(save_checkpoint(tmp_path / "c", ours))
    total = sum(p.nbytes for p in ours.parameters())
    assert total > 8 * limit

    def read(name: str) -> torch.Tensor:
        return checkpoint.tensor(f"model/{name}")

    for folder in ("hf", "back"):
        (tmp_path / folder).mkdir()
    with LiveBytes() as exporting_bytes:
        write_family_weights(tmp_path / "hf", family, config, read, torch.float32, limit)
    files = WeightFiles(tmp_path / "hf", family.canonical)
    with LiveBytes() as importing_bytes:
        write_checkpoint_weights(tmp_path / "back", files, family, config, limit)
    for used in (exporting_bytes.peak, importing_bytes.peak):
        assert limit / 2 < used < 2.5 * limit, used


def test_a_checkpoint_of_several_processes(tmp_path: Path):
    ours = disturbed(MODELS["qwen3_5_text"][1])
    run_ranks(save_half, 2, tmp_path / "step-00000012", ours)
    assert len(list((tmp_path / "step-00000012").glob("*.safetensors"))) == 2
    export(tmp_path / "step-00000012", tmp_path / "hf", check_tokens=16)
    import_folder(tmp_path / "hf", tmp_path / "back", check_tokens=16)
    found = weights_of(tmp_path / "back")
    assert all(torch.equal(found[name], p) for name, p in ours.named_parameters())


def test_models_that_no_family_or_another_family_expresses(tmp_path: Path):
    mixed = save_checkpoint(tmp_path / "mixed", disturbed(tiny_config(["mamba2", "gated_deltanet"])))
    with pytest.raises(ConfigError, match="no family of transformers' models can express this model") as refused:
        export(mixed, tmp_path / "hf")
    assert "granitemoehybrid: model.layers with gated_deltanet (it has attention and mamba2)" in refused.value.details
    plain = save_checkpoint(tmp_path / "plain", disturbed(granite()))
    with pytest.raises(ConfigError, match=r"qwen3_5_text cannot express .*; use --to granitemoehybrid") as refused:
        export(plain, tmp_path / "hf", "qwen3_5_text")
    assert any(d.startswith("model.norm=plain: it has zero_centred; granitemo") for d in refused.value.details)
    assert any("model.layers with mamba2" in d and "granitemoehybrid can" in d for d in refused.value.details)
    grouped = granite()
    grouped.mamba2 = dataclasses.replace(grouped.mamba2, num_groups=2)
    with pytest.raises(ConfigError, match=r"granitemoehybrid cannot express model\.mamba2\.num_groups=2; no other"):
        export(save_checkpoint(tmp_path / "grouped", disturbed(grouped)), tmp_path / "hf", "granitemoehybrid")
    assert not (tmp_path / "hf").exists()


def test_the_first_family_that_fits_is_taken(tmp_path: Path):
    for name in ("granitemoehybrid", "olmo_hybrid", "qwen3_5_text-transformer"):
        model_type, config = MODELS[name]
        checkpoint = save_checkpoint(tmp_path / f"{name}-c", disturbed(config))
        assert export(checkpoint, tmp_path / name, check_tokens=16).model_type == model_type


@pytest.mark.parametrize("way", ["export", "import"])
def test_a_failed_check_leaves_nothing(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint = save_checkpoint(tmp_path / "c", disturbed(MODELS["qwen3_5_text"][1]))
    if way == "import":
        export(checkpoint, tmp_path / "hf", check_tokens=16)
    before = sorted(path.name for path in tmp_path.iterdir())
    mappings = type(family_of("qwen3_5_text")).mappings

    def swapped(self: object, config: ModelConfig) -> list:
        """The map with a feed-forward's gate and up exchanged, so that every name and shape fits."""
        found = mappings(self, config)
        gate = next(i for i, link in enumerate(found) if link.ours == ("blocks.1.mlp.gate_proj.weight",))
        first, second = found[gate : gate + 2]
        found[gate : gate + 2] = [
            dataclasses.replace(first, theirs=second.theirs), dataclasses.replace(second, theirs=first.theirs),
        ]  # fmt: skip
        return found

    monkeypatch.setattr(type(family_of("qwen3_5_text")), "mappings", swapped)
    with pytest.raises(DataError, match="the check failed"):
        export(checkpoint, tmp_path / "out") if way == "export" else import_folder(tmp_path / "hf", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_folder_with_files_stays_as_it_is(tmp_path: Path):
    checkpoint = save_checkpoint(tmp_path / "c", disturbed(MODELS["qwen3_5_text"][1]))
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/precious").write_text("x")
    with pytest.raises(DataError, match="exists and is not empty"):
        export(checkpoint, tmp_path / "hf", check_tokens=16)
    assert [path.name for path in (tmp_path / "hf").iterdir()] == ["precious"]


def test_a_damaged_checkpoint_is_refused(tmp_path: Path):
    checkpoint = save_checkpoint(tmp_path / "c", disturbed(MODELS["qwen3_5_text"][1]))
    shard = next(checkpoint.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(DataError, match="is damaged"):
        export(checkpoint, tmp_path / "hf")


def test_an_older_checkpoint_of_a_run_is_taken_only_where_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """This holds for a conversion, and for all commands that open a model."""
    train_tokenizer(["the windows of a model that sleeps " * 20], 300, tmp_path / "tokenizer.model")
    model = disturbed(dataclasses.replace(tiny_config(["gated_deltanet", "attention"]), vocab_size=300))
    config = run_config(model.config, str(tmp_path / "tokenizer.model"))
    older, newest = (save_checkpoint(tmp_path / "r/checkpoints" / f"step-{n:08d}", model, config) for n in (3, 12))
    flip(newest / "state.json", 0.5)
    place, out = str(tmp_path / "r"), tmp_path / "hf"
    export_it = ["convert", "export", place, str(out), "--check-tokens", "16"]
    generate = ["generate", place, "--prompt", "the", "--max-new-tokens", "0", "--device", "cpu"]
    for command in (export_it, generate):
        assert main(command) == 2
        output = capsys.readouterr().err
        assert f"{newest.name} is damaged (the checksum of state.json" in output and str(older) in output
        assert command is generate or not out.exists()
        assert main([*command, "--allow-older"]) == 0
        output = capsys.readouterr().err
        assert f"{newest.name} is damaged" in output and f"{older.name} is taken" in output
    assert (out / "model.safetensors").is_file()
