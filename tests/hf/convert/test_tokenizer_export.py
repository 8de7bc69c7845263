"""The tokenizer of an export."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from sleeptrain.data.tokenizer import load_tokenizer, train_tokenizer
from sleeptrain.errors import DataError
from sleeptrain.hf.convert.exporting import export
from sleeptrain.hf.convert.fast_tokenizer import fast_files
from tests.data.texts import make_texts
from tests.hf.checkpoints import run_config, save_checkpoint
from tests.hf.models import disturbed
from tests.models import tiny_config


def test_a_tokenizer_that_is_not_that_of_training(tmp_path: Path):
    """Another one at the same path is refused. A named one may be other files with the same ids."""
    texts = make_texts(40)
    tokenizer = train_tokenizer(texts, 320, tmp_path / "t.model")
    other = train_tokenizer(make_texts(40, seed=1), 320, tmp_path / "other.model")
    model = disturbed(dataclasses.replace(tiny_config(["gated_deltanet"]), vocab_size=320))
    config = run_config(model.config, str(tmp_path / "t.model"))
    checkpoint = save_checkpoint(tmp_path / "c", model, config, tokenizer=tokenizer.hash)
    export(checkpoint, tmp_path / "hf", check_tokens=16)
    same = tmp_path / "same"
    same.mkdir()
    for name, content in fast_files(tokenizer).items():
        (same / name).write_bytes(content)
    assert load_tokenizer(same).hash != tokenizer.hash
    assert export(checkpoint, tmp_path / "hf2", tokenizer=same, check_tokens=16).tokenizer
    with pytest.raises(DataError, match="the ids that transformers gives"):
        export(checkpoint, tmp_path / "hf3", tokenizer=tmp_path / "other.model", check_tokens=16)
    (tmp_path / "t.model").write_bytes((tmp_path / "other.model").read_bytes())
    for named in (None, same):
        with pytest.raises(DataError, match=rf"is not that of the training \({tokenizer.hash}\), and that one is not"):
            export(checkpoint, tmp_path / "hf3", tokenizer=named, check_tokens=16)
    assert other.hash == load_tokenizer(tmp_path / "t.model").hash
    assert not export(checkpoint, tmp_path / "hf4", with_tokenizer=False, check_tokens=16).tokenizer
