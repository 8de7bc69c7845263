from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sleeptrain.config.schema import DataConfig, MixtureStage, Rule110Config, ShardsConfig, ShardSource
from sleeptrain.data.batch import PAD, Part
from sleeptrain.data.shards import DamagedDocument, TokenShards, write_shards
from sleeptrain.data.source import ShardsSource, build_source
from sleeptrain.data.tasks.rule110 import Rule110
from sleeptrain.data.tasks.source import TaskSource
from sleeptrain.data.tokenizer import SentencePieceTokenizer, train_tokenizer
from sleeptrain.errors import ConfigError, DataError
from tests.data.numbered import assert_equal, joined, short_stretches
from tests.data.texts import make_texts


@pytest.fixture(autouse=True)
def _short_stretches() -> Iterator[None]:
    with short_stretches():
        yield


@pytest.fixture
def config(shards: TokenShards, tokenizer: SentencePieceTokenizer, tmp_path: Path) -> DataConfig:
    """A mixture of three sources: two have held-out text, the third has none."""
    for number, name in enumerate(["validation", "code", "code-validation", "extra"], start=1):
        write_shards(tmp_path / name, make_texts(20, seed=number), tokenizer, name=name, shard_bytes=5_000)
    (tmp_path / "tokenizer.model").write_bytes(next(iter(tokenizer.files.values())))
    sources = [
        ShardSource("text", str(tmp_path / "shards"), str(tmp_path / "validation"), 0.5),
        ShardSource("code", str(tmp_path / "code"), str(tmp_path / "code-validation"), 0.3),
        ShardSource("extra", str(tmp_path / "extra"), "", 0.2),
    ]
    settings = ShardsConfig(tokenizer=str(tmp_path / "tokenizer.model"), sources=sources, shuffle=2)
    return DataConfig(source="shards", sequence=64, batch=4, seed=3, shards=settings)


@pytest.mark.parametrize("name", ["shards", "rule110"])
def test_every_source_keeps_the_contract(config: DataConfig, name: str) -> None:
    config = replace(config, source=name, rule110=Rule110Config(width=8, strings=2, validation_samples=20))
    source, other, skipping = build_source(config), build_source(config), build_source(config)
    assert source.batch(4).tokens_BT.shape == (4, source.sequence)
    skipping.skip(4)
    state = json.loads(json.dumps(source.state_dict()))
    assert skipping.state_dict() == source.state_dict()
    following = [source.batch(3) for _ in range(3)]
    other.load_state_dict(state)
    for batch in following:
        assert_equal(other.batch(3), batch)
        assert_equal(skipping.batch(3), batch)
    assert source.held_out
    for held_out in source.held_out:
        batches = list(source.validation_batches(held_out, 4, 3))
        assert len(batches) == 3
        for batch, again in zip(batches, other.validation_batches(held_out, 4, 3), strict=True):
            assert_equal(batch, again)
        for batch in [*following, *batches]:
            assert int(batch.tokens_BT.min()) >= 0 and int(batch.tokens_BT.max()) < source.vocab_size
    json.dumps(source.report())


@pytest.mark.parametrize("name", ["shards", "rule110"])
def test_parts_are_the_rows_of_one_source(config: DataConfig, name: str) -> None:
    config = replace(config, source=name, rule110=Rule110Config(width=8))
    source = build_source(config)
    parts = [build_source(config, Part(rank, 3)) for rank in range(3)]
    for rows in (7, 7, 2):
        assert_equal(joined([part.batch(rows) for part in parts]), source.batch(rows))
    assert all(part.state_dict() == source.state_dict() for part in parts)


def test_a_mixture_reads_the_text_of_its_sources(
    config: DataConfig, tokenizer: SentencePieceTokenizer, texts: list[str]
) -> None:
    source = ShardsSource(config)
    corpora = ["\0".join(texts), "\0".join(make_texts(20, seed=2)), "\0".join(make_texts(20, seed=4))]
    seen = [0, 0, 0]
    for _ in range(60):
        batch = source.batch(4)
        for row in range(4):
            for document in batch.documents_BT[row].unique().tolist():
                part = batch.tokens_BT[row][batch.documents_BT[row] == document]
                text = tokenizer.decode(part.tolist()).strip("\N{REPLACEMENT CHARACTER}")
                assert text in corpora[document % 3]
                seen[document % 3] += len(part)
    for tokens, weight in zip(seen, [0.5, 0.3, 0.2], strict=True):
        assert tokens / sum(seen) == pytest.approx(weight, abs=0.1)
    epochs = source.report()["epochs"]
    assert list(epochs) == ["text", "code", "extra"]
    assert epochs["code"] == pytest.approx(0.3 * sum(seen) / source.train["code"].num_tokens, rel=1e-3)
    assert source.vocab_size == tokenizer.vocab_size


def test_weights_change_by_the_curriculum(config: DataConfig) -> None:
    """Only `extra` is read from 2,560 tokens on: a source that the stage does not name has weight 0."""
    config.shards.curriculum = [MixtureStage(2_560, {"extra": 1.0})]
    source = ShardsSource(config)
    kinds = [set((source.batch(4).documents_BT % 3).flatten().tolist()) for _ in range(30)]
    assert {0, 1} <= set().union(*kinds[:9])
    assert all(kind == {2} for kind in kinds[20:])
    epochs = source.report()["epochs"]
    assert epochs["text"] * source.train["text"].num_tokens == pytest.approx(0.5 * 2_560, abs=4)


def test_held_out_sets_have_the_names_of_their_sources(config: DataConfig, tokenizer: SentencePieceTokenizer) -> None:
    source = ShardsSource(config)
    assert source.held_out == ["text", "code"]
    for name, seed in (("text", 1), ("code", 3)):
        row = next(source.validation_batches(name, 1, 1))
        assert tokenizer.decode(row.tokens_BT[0].tolist()) in "\0".join(make_texts(20, seed=seed))
        assert (row.documents_BT != PAD).all()
    assert len(list(source.validation_batches("code", 1))) > len(list(source.validation_batches("code", 1, 2))) == 2


def test_validation_does_not_depend_on_the_seed(config: DataConfig) -> None:
    other = replace(config, seed=9)
    for name in ("text", "code"):
        first, second = (ShardsSource(c).validation_batches(name, 4) for c in (config, other))
        for batch, again in zip(first, second, strict=True):
            assert_equal(batch, again)
    assert not torch.equal(ShardsSource(config).batch(4).tokens_BT, ShardsSource(other).batch(4).tokens_BT)


def test_a_state_for_other_held_out_text_is_refused(config: DataConfig) -> None:
    state = ShardsSource(config).state_dict()
    config.shards.sources[1].validation = config.shards.sources[2].train
    with pytest.raises(DataError, match="held-out data="):
        ShardsSource(config).load_state_dict(state)


@pytest.mark.parametrize(("field", "name"), [("train", "code"), ("validation", "code-validation")])
def test_shards_must_exist(config: DataConfig, field: str, name: str) -> None:
    shutil.rmtree(getattr(config.shards.sources[1], field))
    with pytest.raises(DataError, match=name):
        ShardsSource(config)


def test_the_tokenizer_must_exist(config: DataConfig) -> None:
    Path(config.shards.tokenizer).unlink()
    with pytest.raises(DataError, match=r"tokenizer\.model"):
        ShardsSource(config)


@pytest.mark.parametrize("field", ["train", "validation"])
@pytest.mark.parametrize("named", [True, False], ids=["tokenizer given", "no tokenizer"])
def test_another_tokenizer_is_refused(config: DataConfig, tmp_path: Path, field: str, named: bool) -> None:
    """Without a tokenizer to compare with, the message names both folders."""
    foreign = train_tokenizer(make_texts(40, seed=7), 320, tmp_path / "foreign.model")
    write_shards(tmp_path / "foreign", make_texts(3), foreign, name="foreign")
    setattr(config.shards.sources[1], field, str(tmp_path / "foreign"))
    message = r"foreign was made with the tokenizer of sha256.*data\.shards\.tokenizer"
    if not named:
        config.shards.tokenizer = ""
        message = rf"{tmp_path}/foreign was made with another tokenizer.*than {tmp_path}/shards"
    with pytest.raises(DataError, match=message):
        ShardsSource(config)


def test_impossible_weights_are_refused(config: DataConfig) -> None:
    config.shards.sources[0].weight = 0.123456789
    with pytest.raises(ConfigError, match="too fine"):
        ShardsSource(config)


def damage(config: DataConfig) -> None:
    """Changes a byte of the first document of the first shard of `text`."""
    path = Path(config.shards.sources[0].train) / "shard-000000.tar"
    content = bytearray(path.read_bytes())
    content[512 + 128] ^= 1  # after the headers of the tar and of the array
    times = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("on_damage", ["stop", "skip"])
def test_damage_stops_the_run_or_is_skipped_and_counted(config: DataConfig, on_damage: str, workers: int) -> None:
    config.shards.on_damage, config.shards.workers = on_damage, workers
    damage(config)
    source = ShardsSource(config)
    steps = 2 * source.train["text"].num_tokens // (4 * 64)
    if on_damage == "stop":
        with pytest.raises(DamagedDocument, match=r"shard-000000\.tar: document 0 .*on_damage=skip"):
            for _ in range(3 * steps):
                source.batch(4)
        return
    pads = sum(int((source.batch(4).documents_BT == PAD).sum()) for _ in range(3 * steps))
    length = source.train["text"].lengths(0)[0]
    assert pads and pads % length in (0, *range(length))
    assert source.report()["damaged"] == 1


def test_rule110_gets_the_seed() -> None:
    config = DataConfig(source="rule110", seed=5, rule110=Rule110Config(width=8))
    assert_equal(build_source(config).batch(4), TaskSource(Rule110(config.rule110), 5).batch(4))


def test_unknown_source() -> None:
    with pytest.raises(ConfigError, match=r"data\.source='books'"):
        build_source(DataConfig(source="books"))
