"""Imports: folders as on the hub, the sizes of real models, and a run that begins with an import."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sleeptrain.checkpoint.vocabulary import tokenizer_of
from sleeptrain.cli import main
from sleeptrain.config.schema import AttentionConfig, GatedDeltaNetConfig, ModelConfig
from sleeptrain.data.tokenizer import load_tokenizer, train_tokenizer
from sleeptrain.errors import DataError
from sleeptrain.hf.convert.fast_tokenizer import fast_files
from sleeptrain.hf.convert.importing import check_tensors, import_folder
from sleeptrain.hf.convert.weight_files import WeightFiles
from sleeptrain.hf.families import family_of
from tests.data.test_hf_tokenizer import EOS
from tests.data.test_hf_tokenizer import make as make_tokenizer
from tests.hf.checkpoints import weights_of
from tests.hf.convert.folders import change_config, change_weights, refused


def test_missing_and_unexpected_tensors_are_listed(folder: Path):
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.0.linear_attn.conv1d.bias"] = torch.zeros(4)
        del weights["model.layers.1.self_attn.k_norm.weight"], weights["model.norm.weight"]

    change_weights(folder, change)
    error = refused(folder)
    assert "2 missing, 1 unexpected" in str(error)
    assert error.details == (
        "missing: model.layers.1.self_attn.k_norm.weight",
        "missing: model.norm.weight",
        "unexpected: model.layers.0.linear_attn.conv1d.bias",
    )


def test_another_shape_is_refused(folder: Path):
    change_weights(folder, lambda w: w.update({"model.embed_tokens.weight": torch.zeros(19, 16)}))
    assert refused(folder).details == ("model.embed_tokens.weight: [19, 16], not [17, 16]",)


def test_a_tied_head_must_be_the_embeddings(folder: Path, tmp_path: Path):
    change_weights(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    import_folder(folder, tmp_path / "back", check_tokens=16)
    change_weights(folder, lambda w: w["lm_head.weight"][0].add_(1))
    with pytest.raises(DataError, match=r"lm_head\.weight differs from the embeddings"):
        import_folder(folder, tmp_path / "out")


def test_a_tokenizer_of_another_model_is_refused(folder: Path):
    tokenizer = train_tokenizer(["text of few words " * 50], 290, folder.parent / "tokenizer.model")
    (folder.parent / "tokenizer.model").unlink()
    for name, content in fast_files(tokenizer).items():
        (folder / name).write_bytes(content)
    assert "has 290 ids, the model 17: it is another model's" in str(refused(folder))


@pytest.mark.parametrize("place", ["special_tokens_map.json", "config.json", "generation_config.json"])
def test_eos_is_read_from_each_file(folder: Path, tmp_path: Path, place: str):
    make_tokenizer(tmp_path / "t")
    vocabulary = json.loads((tmp_path / "t/tokenizer.json").read_bytes())
    change_weights(folder, lambda w: w.update({"model.embed_tokens.weight": torch.randn(310, 16)}))
    change_config(folder, vocab_size=310, eos_token_id=None)
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    path = folder / place
    before = json.loads(path.read_bytes()) if path.exists() else {}
    settings = {"eos_token": {"content": EOS}} if place.startswith("special") else {"eos_token_id": [1, 2]}
    path.write_text(json.dumps(before | {"eos_token_id": None} | settings))
    assert import_folder(folder, tmp_path / "out", check_tokens=16).tokenizer
    assert load_tokenizer(tmp_path / "out").eos_id == 1
    assert tokenizer_of(tmp_path / "out") == load_tokenizer(folder).hash


def test_without_an_eos_the_way_out_is_a_flag_of_import(folder: Path, tmp_path_factory):
    change_config(folder, eos_token_id=None)
    (folder / "generation_config.json").unlink(missing_ok=True)
    vocabulary = make_tokenizer(tmp_path_factory.mktemp("t")) / "tokenizer.json"
    (folder / "tokenizer.json").write_bytes(vocabulary.read_bytes())
    assert "write one of its tokens as eos_token into tokenizer_config.json" in str(refused(folder))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}))
    assert "has 310 ids, the model 17" in str(refused(folder)), "that was all"


def test_the_text_model_of_a_model_that_sees_images(folder: Path, tmp_path: Path):
    """On the hub the settings are in `text_config`, names differ, and there are a vision tower and a draft head."""
    expected = tmp_path / "expected"
    import_folder(folder, expected, check_tokens=16)
    text = json.loads((folder / "config.json").read_bytes())
    tied = text.pop("tie_word_embeddings")
    settings = {"model_type": "qwen3_5", "text_config": text, "tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(settings))
    weights = load_file(folder / "model.safetensors")
    renamed = {name.replace("model.", "model.language_model.", 1): w for name, w in weights.items()}
    others = {"model.visual.patch_embed.proj.bias": torch.zeros(4), "mtp.fc.weight": torch.zeros(2, 2)}
    save_file(renamed | others, folder / "model.safetensors", {"format": "pt"})
    result = import_folder(folder, tmp_path / "out", check_tokens=16)
    assert sorted(result.left_out) == sorted(others)
    a, b = weights_of(expected), weights_of(tmp_path / "out")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Qwen3.5-0.8B and -2B: width, feed-forward width, and number of parameters of the text model in a bf16 file.
REAL = {"0.8B": (1024, 3584, 752_393_024), "2B": (2048, 6144, 1_881_825_088)}


@pytest.mark.parametrize("size", REAL)
def test_every_tensor_of_the_real_sizes_is_accounted_for(size: str, tmp_path: Path):
    dim, ffn_dim, num_parameters = REAL[size]
    config = ModelConfig(
        vocab_size=248_320, dim=dim, ffn_dim=ffn_dim, layers=(["gated_deltanet"] * 3 + ["attention"]) * 6,
        attention=AttentionConfig(8, 2, 256, 1e7, 0.25), gated_deltanet=GatedDeltaNetConfig(16, 16, 128, 128),
    )  # fmt: skip
    shapes = real_shapes(config)
    others = {"model.visual.merger.norm.weight": (dim,), "mtp.layers.0.mlp.up_proj.weight": (ffn_dim, dim)}
    sparse_file(tmp_path / "model.safetensors", shapes | others)
    family = family_of("qwen3_5_text")
    files = WeightFiles(tmp_path, family.canonical)
    check_tensors(files, family, config)
    assert sorted(files.left_out) == sorted(others)
    assert sum(math.prod(form.shape) for form in files.forms.values()) == num_parameters
    del shapes["model.language_model.layers.23.self_attn.o_proj.weight"]
    sparse_file(tmp_path / "model.safetensors", shapes | others)
    with pytest.raises(DataError) as error:
        check_tensors(WeightFiles(tmp_path, family.canonical), family, config)
    assert error.value.details == ("missing: model.layers.23.self_attn.o_proj.weight",)


def real_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes by the names on the hub, from transformers' own class on the meta device."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    with torch.device("meta"):
        theirs = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**family_of("qwen3_5_text").to_config(config)))
    return {name.replace("model.", "model.language_model.", 1): tuple(p.shape) for name, p in theirs.named_parameters()}


def sparse_file(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Writes a file of bf16 zeros that takes no room on the disk."""
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    written = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(written).to_bytes(8, "little") + written)
        file.truncate(8 + len(written) + at)


def test_a_run_begins_with_an_import_and_is_exported(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """The whole way: import, train with more passes, export, through the command line."""
    change_weights(
        folder, lambda w: w.update({"model.embed_tokens.weight": w["model.embed_tokens.weight"][:3].clone()})
    )
    change_config(folder, vocab_size=3)
    out = tmp_path / "my run, a=b é's.yaml"
    assert main(["convert", "import", str(folder), str(out), "--check-tokens", "16"]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  sleeptrain ")]
    program, *printed, dots = shlex.split(line)
    assert (program, printed[0], dots) == ("sleeptrain", "train", "...")
    settings = [
        "experiment=rule110", f"run.root={tmp_path}", "run.name=on", "sleep.passes=2", "data.batch=2",
        "train.tokens=400", "data.rule110.validation_samples=2", "train.eval_every=0", "train.device=cpu",
        "wandb.mode=disabled",
    ]  # fmt: skip
    assert main([*printed, *settings]) == 0
    [first, *_, last] = sorted((tmp_path / "on/checkpoints").glob("step-*"))
    start, imported = weights_of(first), weights_of(out)
    assert start.keys() == imported.keys() and all(torch.equal(start[name], imported[name]) for name in start)
    assert main(["convert", "export", str(tmp_path / "on"), str(tmp_path / "hf2"), "--check-tokens", "16"]) == 0
    assert "checked: the logits of both models differ by" in capsys.readouterr().out
    found = load_file(tmp_path / "hf2/model.safetensors")
    assert torch.equal(found["model.norm.weight"], weights_of(last)["norm.weight"])
    assert json.loads((tmp_path / "hf2/config.json").read_bytes())["sleep"]["passes"] == 2
