"""A model and its tokenizer from a checkpoint or a folder, or the reason of a refusal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sleeptrain.data.tokenizer import Tokenizer, train_tokenizer
from sleeptrain.errors import ConfigError, DataError
from sleeptrain.hf.load_for_inference import encode_prompt, open_model
from sleeptrain.hf.model.configuration import sleep_dict
from sleeptrain.model.hybrid import Hybrid
from tests.data.texts import make_texts
from tests.hf.checkpoints import run_config, save_checkpoint, stopping_config
from tests.hf.models import disturbed
from tests.models import tiny_config
from tests.sleep.gates import a_gate, gated_settings
from tests.sleep.trained import texts


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tokenizer]:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return path, train_tokenizer(make_texts(40), 320, path)


@pytest.fixture
def model() -> Hybrid:
    return disturbed(replace(tiny_config(["gated_deltanet", "attention"]), vocab_size=320))


def test_a_checkpoint_sleeps_as_it_did_at_its_step(
    model: Hybrid, tokenizer: tuple[Path, Tokenizer], tmp_path: Path
) -> None:
    path, own = tokenizer
    checkpoint = save_checkpoint(tmp_path / "c", model, run_config(model.config, str(path)), tokenizer=own.hash)
    opened, found = open_model(checkpoint, device="cpu")
    assert found.hash == own.hash and not opened.training
    sleep = opened.config.sleep_settings()
    assert (sleep.passes, sleep.window, sleep.feedback, sleep.core) == (3, 16, "none", [0, 2])
    weights = dict(model.named_parameters())
    assert {name for name, _ in opened.model.named_parameters()} == set(weights)
    assert all(torch.equal(p, weights[name]) for name, p in opened.model.named_parameters())
    narrow, _ = open_model(checkpoint, device="cpu", dtype="bfloat16")
    assert narrow.dtype == torch.bfloat16


def test_a_checkpoint_follows_the_stop_rule_of_its_run(
    model: Hybrid, tokenizer: tuple[Path, Tokenizer], tmp_path: Path
) -> None:
    path, own = tokenizer
    config = stopping_config(model.config, str(path))
    checkpoint = save_checkpoint(tmp_path / "change", model, config, tokenizer=own.hash)
    opened, _ = open_model(checkpoint, device="cpu")
    assert sleep_dict(opened.config.sleep_settings()) == sleep_dict(config.sleep) and opened.stop_gate is None
    config.sleep = gated_settings(model.double(), texts([13, 9, 18, 16]), tmp_path / "gate.safetensors")
    checkpoint = save_checkpoint(tmp_path / "gate", model.float(), config, tokenizer=own.hash)
    opened, _ = open_model(checkpoint, device="cpu", dtype="bfloat16")
    assert sleep_dict(opened.config.sleep_settings()) == sleep_dict(config.sleep) and opened.stop_gate is not None
    for found, expected in zip(opened.stop_gate.parameters(), a_gate().parameters(), strict=True):
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


def test_a_folder_of_transformers_is_read_as_it_is(
    model: Hybrid, tokenizer: tuple[Path, Tokenizer], tmp_path: Path
) -> None:
    path, own = tokenizer
    checkpoint = save_checkpoint(tmp_path / "c", model, run_config(model.config, str(path)), tokenizer=own.hash)
    opened, _ = open_model(checkpoint, device="cpu", dtype="bfloat16")
    opened.save_pretrained(tmp_path / "hf")
    with pytest.raises(DataError, match="tokenizer"):
        open_model(tmp_path / "hf", device="cpu")
    again, found = open_model(tmp_path / "hf", path, device="cpu")
    assert again.dtype == torch.bfloat16 and found.hash == own.hash
    assert again.config.sleep == opened.config.sleep
    assert open_model(tmp_path / "hf", path, device="cpu", dtype="float32")[0].dtype == torch.float32


def test_missing_parts_of_a_place_are_named(model: Hybrid, tokenizer: tuple[Path, Tokenizer], tmp_path: Path) -> None:
    path, own = tokenizer
    task = save_checkpoint(tmp_path / "task", model)
    with pytest.raises(DataError, match=r"trained on data\.source=rule110, which has no tokenizer: name one"):
        open_model(task, device="cpu")
    other = save_checkpoint(tmp_path / "o", model, run_config(model.config, str(path)), tokenizer="0" * 64)
    with pytest.raises(DataError, match="is not the one that the weights of"):
        open_model(other, device="cpu")
    small = disturbed(replace(model.config, vocab_size=300))
    few = save_checkpoint(tmp_path / "few", small, run_config(small.config, str(path)), tokenizer=own.hash)
    with pytest.raises(DataError, match=r"has 320 ids, the model 300: it is another model's"):
        open_model(few, device="cpu")


def test_an_unknown_dtype_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dtype=int8: allowed: auto, "):
        open_model(tmp_path / "absent", dtype="int8")


def test_a_document_begins_with_bos(tokenizer: tuple[Path, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    _, own = tokenizer
    assert encode_prompt(own, "a b") == [own.bos_id, *own.encode("a b")]
    assert encode_prompt(own, "a b", begins=False) == own.encode("a b")
    monkeypatch.setattr(own, "bos_id", None)
    assert encode_prompt(own, "a b") == own.encode("a b")
