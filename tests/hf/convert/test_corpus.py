"""Documents of a run's data."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from sleeptrain.cli import main
from sleeptrain.config.schema import ShardSource
from sleeptrain.data.shard_build import index_folder
from sleeptrain.data.shards import write_shards
from sleeptrain.data.tokenizer import load_tokenizer, train_tokenizer
from sleeptrain.errors import DataError
from sleeptrain.hf.convert.corpus import sampled_documents
from sleeptrain.hf.convert.exporting import export
from tests.data.test_hf_tokenizer import BOS, EOS
from tests.data.test_hf_tokenizer import make as make_tokenizer
from tests.data.texts import make_texts
from tests.hf.checkpoints import run_config, save_checkpoint
from tests.hf.models import disturbed
from tests.models import tiny_config


def test_the_tokenizer_is_compared_on_the_runs_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Held-out documents of one source, training documents of the other. Sources that cannot be read are ignored."""
    texts = [f"document {i}: what a model reads while it sleeps, a naïve 日 {i * 37}" for i in range(40)]
    tokenizer = train_tokenizer(texts, 320, tmp_path / "tokenizer.model")
    write_shards(tmp_path / "held_out", texts[:9], tokenizer, "held_out")
    write_shards(tmp_path / "train", texts[9:], tokenizer, "train")
    model = disturbed(dataclasses.replace(tiny_config(["gated_deltanet"]), vocab_size=320))
    config = run_config(model.config, str(tmp_path / "tokenizer.model"))
    config.data.shards.sources = [
        ShardSource("a", str(tmp_path / "none"), str(tmp_path / "held_out")),
        ShardSource("b", str(tmp_path / "train")),
        ShardSource("c", "s3://bucket/train", "pipe:exit 1 shard-{000000..000001}.tar"),
        ShardSource("d", str(tmp_path / "gone")),
    ]
    found = sampled_documents(config.data.shards, tokenizer)
    assert sorted(document.text for document in found) == sorted(texts)
    assert all(document.ids == [tokenizer.bos_id, *tokenizer.encode(document.text)] for document in found)
    monkeypatch.setattr("sleeptrain.hf.convert.corpus.DOCUMENTS", 20)
    assert len(sampled_documents(config.data.shards, tokenizer)) == 2 * 5
    checkpoint = str(save_checkpoint(tmp_path / "c", model, config))
    assert main(["convert", "export", checkpoint, str(tmp_path / "hf"), "--check-tokens", "16"]) == 0
    assert "a built-in sample and of 10 documents of the run's data" in capsys.readouterr().out
    encode = type(tokenizer).encode
    other = lambda self, text: [5] if text.startswith("document 12:") else encode(self, text)  # noqa: E731
    monkeypatch.setattr(type(tokenizer), "encode", other)
    with pytest.raises(DataError, match=r"ids that transformers gives 'document 12: .* differ"):
        export(Path(checkpoint), tmp_path / "other", check_tokens=16)
    monkeypatch.undo()
    own = train_tokenizer(texts, 300, tmp_path / "own.model")
    assert sampled_documents(config.data.shards, own) == [], "made with another tokenizer"


def test_documents_made_elsewhere_without_bos_fail_the_check(tmp_path: Path):
    """The tokenizer would begin with a BOS that no document of the run's shards has."""
    tokenizer = load_tokenizer(make_tokenizer(tmp_path / "t", {"bos_token": BOS, "eos_token": EOS}))
    bare = load_tokenizer(tmp_path / "t", bos_token="")
    write_shards(tmp_path / "train", make_texts(5), bare, "train")
    index_folder(tmp_path / "train", tokenizer)
    model = disturbed(dataclasses.replace(tiny_config(["gated_deltanet"]), vocab_size=tokenizer.vocab_size))
    config = run_config(model.config, str(tmp_path / "t"))
    config.data.shards.sources = [ShardSource("a", str(tmp_path / "train"))]
    with pytest.raises(DataError, match="differ from those of training from the 1th on"):
        export(save_checkpoint(tmp_path / "c", model, config), tmp_path / "hf", check_tokens=16)
    assert not (tmp_path / "hf").exists()
