from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from sleeptrain.config.schema import DataConfig, Rule110Config, ShardsConfig
from sleeptrain.data.batch import PAD, Batch
from sleeptrain.data.shards import TokenShards, write_shards
from sleeptrain.data.source import ShardsSource, build_source
from sleeptrain.data.tokenizer import Tokenizer, train_tokenizer
from sleeptrain.errors import ConfigError, DataError
from sleeptrain.tasks.rule110 import Rule110Source
from tests.data.texts import make_texts


@pytest.fixture
def config(shards: TokenShards, tokenizer: Tokenizer, tmp_path: Path) -> DataConfig:
    write_shards(tmp_path / "validation", make_texts(20, seed=1), tokenizer, name="validation")
    train_tokenizer(make_texts(40), 320, tmp_path / "tokenizer.model")
    paths = ShardsConfig(
        train=str(shards.folder), validation=str(tmp_path / "validation"), tokenizer=str(tmp_path / "tokenizer.model")
    )
    return DataConfig(source="shards", sequence=64, batch=4, seed=3, shards=paths)


def equal(left: Batch, right: Batch) -> bool:
    return all(torch.equal(getattr(left, name), getattr(right, name)) for name in Batch.__dataclass_fields__)


@pytest.mark.parametrize("name", ["shards", "rule110"])
def test_every_source_keeps_the_contract(config: DataConfig, name: str) -> None:
    config = dataclasses.replace(config, source=name, rule110=Rule110Config(width=8, strings=2, validation_samples=20))
    source, other = build_source(config), build_source(config)
    assert source.batch(4).tokens_BT.shape == (4, source.sequence)
    state = source.state_dict()
    following = [source.batch(3) for _ in range(3)]
    held_out = list(source.validation_batches(4, 3))
    other.load_state_dict(state)
    assert all(equal(other.batch(3), batch) for batch in following)
    assert len(held_out) == 3
    for batch, again in zip(held_out, other.validation_batches(4, 3), strict=True):
        assert equal(batch, again)
    for batch in [*following, *held_out]:
        assert int(batch.tokens_BT.min()) >= 0 and int(batch.tokens_BT.max()) < source.vocab_size


def test_shards_source_reads_text(config: DataConfig, tokenizer: Tokenizer, texts: list[str]) -> None:
    source = build_source(config)
    batch = source.batch(2)
    first = batch.documents_BT[0] == batch.documents_BT[0, 0]
    text = tokenizer.decode(batch.tokens_BT[0][first].tolist())
    assert any(candidate.startswith(text) for candidate in texts)
    held_out = next(iter(source.validation_batches(1, 1)))
    assert tokenizer.decode(held_out.tokens_BT[0].tolist()) in "".join(make_texts(20, seed=1))
    assert (held_out.documents_BT != PAD).all()
    assert source.vocab_size == tokenizer.vocab_size


def test_validation_does_not_depend_on_the_seed(config: DataConfig) -> None:
    first = next(iter(build_source(config).validation_batches(4, 1)))
    second = next(iter(build_source(dataclasses.replace(config, seed=9)).validation_batches(4, 1)))
    assert equal(first, second)


@pytest.mark.parametrize("name", ["train", "validation", "tokenizer"])
def test_paths_must_be_set(config: DataConfig, name: str) -> None:
    setattr(config.shards, name, "")
    with pytest.raises(ConfigError, match=rf"data\.shards\.{name}"):
        ShardsSource(config)


@pytest.mark.parametrize("name", ["train", "validation", "tokenizer"])
def test_paths_must_exist(config: DataConfig, name: str) -> None:
    path = Path(getattr(config.shards, name))
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    with pytest.raises(DataError, match=path.name):
        ShardsSource(config)


@pytest.mark.parametrize("side", ["train", "validation"])
def test_foreign_shards_are_refused(config: DataConfig, tmp_path: Path, side: str) -> None:
    foreign = train_tokenizer(make_texts(40, seed=7), 320, tmp_path / "foreign.model")
    write_shards(tmp_path / "foreign", make_texts(3), foreign, name="foreign")
    setattr(config.shards, side, str(tmp_path / "foreign"))
    with pytest.raises(DataError, match=r"foreign was made with the tokenizer of sha256"):
        ShardsSource(config)


def test_rule110_gets_the_seed() -> None:
    config = DataConfig(source="rule110", seed=5, rule110=Rule110Config(width=8))
    assert equal(build_source(config).batch(4), Rule110Source(config.rule110, 5).batch(4))


def test_unknown_source() -> None:
    with pytest.raises(ConfigError, match=r"data\.source='books'"):
        build_source(DataConfig(source="books"))
