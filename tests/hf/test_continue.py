"""All steps: train, export, import, train on with more passes and frozen parts, export again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sleeptrain.checkpoint.folder import checkpoints
from sleeptrain.hf.convert.check import TOLERANCE
from sleeptrain.hf.convert.exporting import export
from sleeptrain.hf.convert.importing import import_folder
from sleeptrain.hf.model.modeling import SleepForCausalLM
from sleeptrain.train.logging.metrics import read_metrics
from tests.train.test_trainer import run

STEP = 8 * 7  # tokens
ATTENTION = "{num_heads: 2, num_kv_heads: 2, head_dim: 8, gate: false, qk_norm: none, partial_rotary_factor: 1.0"
JET = (
    "model.layers=[jet,attention,sliding_attention]",
    "model.norm=plain",
    f"model.attention={ATTENTION}, qkv_bias: true, sliding_window: 3}}",
    "model.jet={num_heads: 2, head_k_dim: 8, head_v_dim: 12, kernel_dim: 3}",
)
OURO = (
    "model.layers=[attention,attention]",
    "model.norm=plain",
    "model.sandwich_norms=true",
    "model.norm_between_passes=true",
    "model.tie_embeddings=false",
    "sleep.passes=1",
    f"model.attention={ATTENTION}}}",
)
WITH_JET = (
    "model.layers=[attention,jet,attention]",
    "model.mixer_only=[1]",
    "run.init_inserted=[1]",
    "optim.frozen=['*','!blocks.1.*']",
)
ONE_TO_FOUR = ("sleep.passes=1", f"sleep.curriculum=[{{tokens: {12 * STEP}, passes: 4, ramp: linear}}]")


def passes(folder: Path) -> list[int]:
    return [r["passes"] for r in read_metrics(folder / "r" / "metrics.jsonl") if "passes" in r]


@pytest.mark.slow
def test_jet_nemotron_is_imported_trained_and_exported(tmp_path: Path):
    run(tmp_path / "first", *JET)
    export(tmp_path / "first" / "r", tmp_path / "theirs")
    assert import_folder(tmp_path / "theirs", tmp_path / "ours").model_type == "jet_nemotron"
    thaw = ("optim.frozen=['*','!blocks.0.*']", f"optim.curriculum=[{{tokens: {6 * STEP}}}]")
    run(tmp_path / "second", *JET, f"run.init_from={tmp_path / 'ours'}", *ONE_TO_FOUR, *thaw)
    assert passes(tmp_path / "second") == [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
    export(tmp_path / "second" / "r", tmp_path / "again")
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "again"))
    assert first.keys() == again.keys() and not any(torch.equal(first[name], again[name]) for name in first)
    model = SleepForCausalLM.from_pretrained(tmp_path / "again")
    assert model.sleep_settings().passes == 4
    ids = torch.arange(2 * model.sleep_settings().window + 1)[None] % model.config.vocab_size
    generated = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        expected = model(generated, use_cache=False).logits[:, ids.shape[1] - 1 : -1].argmax(-1)
    assert torch.equal(generated[:, ids.shape[1] :], expected)


@pytest.mark.slow
def test_ouro_is_imported_with_a_memory_inserted(tmp_path: Path):
    run(tmp_path / "first", *OURO)
    export(tmp_path / "first" / "r", tmp_path / "theirs", "ouro")
    assert import_folder(tmp_path / "theirs", tmp_path / "ours").model_type == "ouro"
    more = [setting for setting in OURO if not setting.startswith(("model.layers", "sleep.passes"))]
    run(tmp_path / "second", *more, *WITH_JET, f"run.init_from={tmp_path / 'ours'}", *ONE_TO_FOUR)
    assert passes(tmp_path / "second")[-1] == 4 and len(checkpoints(tmp_path / "second" / "r" / "checkpoints"))


@pytest.mark.parametrize("settings", [JET, OURO])
def test_an_export_is_checked_against_the_published_code(tmp_path: Path, settings: tuple[str, ...]):
    run(tmp_path, *settings)
    assert export(tmp_path / "r", tmp_path / "theirs").error < TOLERANCE
    card = (tmp_path / "theirs" / "README.md").read_text()
    assert "published code, written again, differ from ours by" in card and "AutoModel" not in card
