from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from sleeptrain.commands.data_describe import LAYOUTS, cuts_before, describe, reads, waste
from sleeptrain.config.schema import (
    Config,
    CurriculumStage,
    DataConfig,
    RunConfig,
    ShardsConfig,
    ShardSource,
    SleepConfig,
)
from sleeptrain.data.batch import PAD, Batch
from sleeptrain.data.shards import TokenShards, write_shards
from sleeptrain.data.source import ShardsSource
from sleeptrain.data.stream import ShardStream
from sleeptrain.data.tokenizer import SentencePieceTokenizer
from sleeptrain.sleep.curriculum import stage_shape
from tests.data.numbered import NumberedShards, short_stretches
from tests.data.test_stream import make
from tests.data.texts import make_texts


@pytest.fixture(autouse=True)
def _short_stretches() -> Iterator[None]:
    with short_stretches():
        yield


@pytest.fixture
def config(shards: TokenShards, tokenizer: SentencePieceTokenizer, tmp_path: Path) -> Config:
    """Two sources; the batch has 3 rows, from 800 tokens on 5, from 3,000 on 2."""
    write_shards(tmp_path / "code", make_texts(20, seed=2), tokenizer, name="code", shard_bytes=5_000)
    sources = [
        ShardSource("text", str(tmp_path / "shards"), "", 0.6),
        ShardSource("code", str(tmp_path / "code"), "", 0.4),
    ]
    data = DataConfig(sequence=50, batch=3, shards=ShardsConfig(sources=sources, shuffle=2))
    sleep = SleepConfig(window=25, curriculum=[CurriculumStage(800, batch=5), CurriculumStage(3_000, batch=2)])
    config = Config(run=RunConfig("test"), data=data, sleep=sleep)
    config.train.tokens = 4_000
    return config


def run(config: Config, source: ShardsSource, steps: int) -> list[Batch]:
    """The batches of a run; the curriculum sets the rows of each step."""
    seen, batches = 0, []
    for _ in range(steps):
        batches.append(source.batch(stage_shape(config, seen).batch))
        seen += int((batches[-1].documents_BT != PAD).sum())
    return batches


@pytest.mark.parametrize("layout", ["lanes", "packed"])
def test_reads_are_the_documents_of_the_batch(config: Config, layout: str) -> None:
    config.data.layout = layout
    batches = run(config, ShardsSource(config.data), 25)
    assert [len(batch.tokens_BT) for batch in batches] == [3] * 6 + [5] * 9 + [2] * 10
    for step in (1, 2, 6, 7, 8, 15, 16, 25):
        check_reads(config, step, batches[step - 1])


def test_reads_leave_pads_out(config: Config) -> None:
    config.data.layout, config.sleep.curriculum = "one_document", []
    batches = run(config, ShardsSource(config.data), 20)
    assert any((batch.documents_BT == PAD).any() for batch in batches)
    for step in (1, 5, 20):
        check_reads(config, step, batches[step - 1])


def check_reads(config: Config, step: int, batch: Batch, saved: Sequence[tuple[int, int]] = ()) -> None:
    source = ShardsSource(config.data)
    cuts, rows = cuts_before(config, step, saved)
    assert rows == len(batch.tokens_BT) and sum(steps for _, steps in cuts) == step - 1
    source.stream.seek(cuts)
    found = list(reads(source, *source.stream.next_step(rows)))
    covered = 0
    for read in found:
        shards = source.train[read.source]
        shard = [shard.url for shard in shards.shards].index(read.shard)
        tokens = shards.document(shard, read.document)[slice(*read.tokens)]
        assert batch.tokens_BT[read.row, slice(*read.at)].tolist() == tokens.tolist()
        ids = set(batch.documents_BT[read.row, slice(*read.at)].tolist())
        assert len(ids) == 1 and ids.pop() % 2 == ["text", "code"].index(read.source)
        covered += len(tokens)
    assert covered == int((batch.documents_BT != PAD).sum())
    assert [(read.row, read.at) for read in found] == sorted((read.row, read.at) for read in found)


@pytest.mark.parametrize("step", [1, 2, 6, 7, 8, 15, 16, 17, 40])
def test_cuts_before_a_step_are_the_position_of_the_run(config: Config, step: int) -> None:
    source = ShardsSource(config.data)
    run(config, source, step - 1)
    cuts, rows = cuts_before(config, step)
    assert [list(cut) for cut in cuts] == source.state_dict()["cuts"]
    run_rows = 3 if step <= 6 else 5 if step <= 15 else 2
    assert rows == run_rows


@pytest.mark.parametrize("saved_at", [1, 3, 6, 7, 10, 16, 30])
def test_saved_cuts_are_not_computed_again(config: Config, saved_at: int) -> None:
    """The position at a step does not depend on the step at which it was saved, an earlier or a later one."""
    saved, _ = cuts_before(config, saved_at + 1)
    for step in range(1, 35):
        assert cuts_before(config, step, saved) == cuts_before(config, step)
    other = replace(config, sleep=SleepConfig(window=25))
    assert cuts_before(other, saved_at + 1, saved)[0] == saved
    cuts, rows = cuts_before(other, saved_at + 3, saved)
    assert rows == 3 and sum(steps for _, steps in cuts) == saved_at + 2 and cuts[: len(saved) - 1] == saved[:-1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_waste_is_the_pads_and_cut_documents_of_the_batches(layout: str) -> None:
    """The test counts pads, and tokens of a document whose beginning its row has not read."""
    steps, rows, sequence = 40, 3, 6
    found = waste(make(layout), rows, steps)
    stream = make(layout)
    firsts = {int(document[0]) for document in documents()}
    begun: list[set[int]] = [set() for _ in range(rows)]
    pads = cut_off = 0
    for _ in range(steps):
        batch = stream.batch(rows)
        for row in range(rows):
            if layout == "packed":
                begun[row] = set()
            for token, identity in zip(batch.tokens_BT[row].tolist(), batch.documents_BT[row].tolist(), strict=True):
                if identity == PAD:
                    pads += 1
                    continue
                if token in firsts:
                    begun[row].add(identity)
                cut_off += identity not in begun[row]
    total = steps * rows * sequence
    assert found.pads == pytest.approx(pads / total) and found.cut_off == pytest.approx(cut_off / total)
    assert (found.pads > 0) == (layout == "one_document")
    assert found.cut_off > 0


def documents() -> Iterator[Sequence[int]]:
    shards = make().assembler._sources[0]
    assert isinstance(shards, NumberedShards)
    for shard in range(shards.num_shards):
        for index in range(len(shards.lengths(shard))):
            yield shards.document(shard, index).tolist()


def test_waste_reads_no_documents_and_few_steps() -> None:
    shards = NumberedShards([[7] * 10] * 4, damaged=[(s, i) for s in range(4) for i in range(10)])
    stream = ShardStream({"text": shards}, replace(make().settings, layout="packed"))  # type: ignore[dict-item]
    assert waste(stream, 2, 10**6).pads == 0


def test_describe_counts_what_a_run_reads(config: Config) -> None:
    config.sleep.curriculum = []
    text = describe(config)
    source = ShardsSource(config.data)
    run(config, source, 27)
    assert text.startswith("27 steps of 3 rows of 50 tokens")
    for name, shards in source.train.items():
        assert f"{name}: {shards.num_documents} documents, {shards.num_tokens:,} tokens" in text
        assert f"read {source.report()['epochs'][name]:.3g} times" in text
    assert "lanes: 0.00% pads" in text and text.count("(data.layout)") == 1
    assert all(f"\n{layout}: " in text for layout in LAYOUTS)
