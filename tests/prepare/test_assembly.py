"""The result is assembled from units: numbered shards in order, also after a kill."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sleeptrain.data.shards import TokenShards
from sleeptrain.data.tokenizer import SentencePieceTokenizer
from sleeptrain.errors import DataError
from sleeptrain.prepare.assembly import RECORD, assemble
from sleeptrain.prepare.inputs import named_inputs
from sleeptrain.prepare.report import UnitReport
from sleeptrain.prepare.split import SIDES, side
from sleeptrain.prepare.units import plan_units
from sleeptrain.prepare.work import Work
from sleeptrain.prepare.worker import Recipe, Task, tokenise_unit
from tests.prepare.documents import all_documents
from tests.prepare.test_job import content

Units = list[tuple[int, UnitReport]]


@pytest.fixture
def work(tmp_path: Path) -> Work:
    work = Work(tmp_path / "out")
    work.units.mkdir(parents=True)
    return work


@pytest.fixture
def units(work: Work, write_jsonl: Callable[..., Path], tokenizer: SentencePieceTokenizer, texts: list[str]) -> Units:
    recipe = Recipe(work.units, work.units, "text", 0.3, 8000, False, 10**6)
    planned = plan_units(named_inputs([str(write_jsonl(texts))]), "text", 20_000)
    return [(u.number, tokenise_unit(Task(u), recipe, tokenizer, lambda *counts: None)) for u in planned]


def test_all_documents_are_there_in_order(
    work: Work, units: Units, tokenizer: SentencePieceTokenizer, texts: list[str]
) -> None:
    assert len(units) > 1
    assemble(work, units, tokenizer, b"the record")
    for name in SIDES:
        shards = TokenShards(work.result / name, expect_tokenizer=tokenizer.hash)
        wanted = [text for text in texts if side(text, 0.3) == name]
        assert [tokenizer.decode(tokens) for tokens in all_documents(shards)] == wanted
        tars = sorted(path.name for path in (work.result / name).glob("*.tar"))
        assert tars == [f"shard-{number:06d}.tar" for number in range(len(tars))] and len(tars) > 1
    assert (work.result / RECORD).read_bytes() == b"the record"
    assert {name: (work.result / name).read_bytes() for name in tokenizer.files} == tokenizer.files
    assert list(work.units.rglob("*.tar")) == [], "moved, not copied"


def test_a_moved_shard_is_not_moved_again(work: Work, units: Units, tokenizer: SentencePieceTokenizer) -> None:
    assemble(work, units, tokenizer, b"")
    first = content(work.result)
    for index in work.result.glob("*/index.json"):
        index.unlink()
    assemble(work, units, tokenizer, b"")
    assert content(work.result) == first


def test_a_shard_in_neither_place_is_named(work: Work, units: Units, tokenizer: SentencePieceTokenizer) -> None:
    gone = sorted(work.units.glob("*/train/*.tar"))[1]
    gone.unlink()
    with pytest.raises(DataError, match=f"{gone} is gone; remove {work.path} and call again to start anew"):
        assemble(work, units, tokenizer, b"")
