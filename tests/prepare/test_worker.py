"""A unit of text becomes shards and a report, completely or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sleeptrain.data.tokenizer import SentencePieceTokenizer
from sleeptrain.errors import DataError
from sleeptrain.prepare.inputs import named_inputs
from sleeptrain.prepare.report import UnitReport
from sleeptrain.prepare.split import SIDES, side
from sleeptrain.prepare.units import plan_units
from sleeptrain.prepare.worker import REPORT, Recipe, Task, tokenise_unit, unit_folder
from tests.prepare.test_job import content

SHARE = 0.3


def task(path: Path, limit: int | None = None) -> Task:
    [unit] = plan_units(named_inputs([str(path)]), "text", 10**9)
    return Task(unit, limit)


def recipe(folder: Path, **changes: Any) -> Recipe:
    settings = {"text_field": "text", "validation_share": SHARE, "shard_bytes": 10**6, "skip_bad": False}
    return Recipe(folder, folder, **(settings | {"max_document_bytes": 10**6} | changes))


def nobody(documents: int, num_bytes: int) -> None:
    """Ignores progress."""


def test_each_document_is_counted_on_its_side(
    tmp_path: Path, write_jsonl: Callable[..., Path], tokenizer: SentencePieceTokenizer, texts: list[str]
) -> None:
    ticks = list[tuple[int, int]]()
    report = tokenise_unit(
        task(write_jsonl([*texts, " "])), recipe(tmp_path), tokenizer, lambda *counts: ticks.append(counts)
    )
    wanted = {name: [text for text in texts if side(text, SHARE) == name] for name in SIDES}
    assert {name: report.sides[name].documents for name in SIDES} == {name: len(wanted[name]) for name in SIDES}
    longest = {name: max(len(tokenizer.encode(text)) + 2 for text in wanted[name]) for name in SIDES}
    assert {name: report.sides[name].longest for name in SIDES} == longest
    assert (report.empty, report.bad) == (1, 0)
    assert [sum(counts) for counts in zip(*ticks, strict=True)] == [len(texts), report.num_bytes]
    assert UnitReport.read(unit_folder(tmp_path, 0) / REPORT) == report


def test_the_same_unit_gives_the_same_bytes_again(
    tmp_path: Path, write_jsonl: Callable[..., Path], tokenizer: SentencePieceTokenizer, texts: list[str]
) -> None:
    path, folder = write_jsonl(texts), unit_folder(tmp_path, 0)
    tokenise_unit(task(path), recipe(tmp_path, shard_bytes=8000), tokenizer, nobody)
    first = content(folder)
    (folder / "left").touch()
    tokenise_unit(task(path), recipe(tmp_path, shard_bytes=8000), tokenizer, nobody)
    assert content(folder) == first and len(list(folder.glob("train/*.tar"))) > 1


def test_a_limit_takes_the_first_documents(
    tmp_path: Path, write_jsonl: Callable[..., Path], tokenizer: SentencePieceTokenizer, texts: list[str]
) -> None:
    report = tokenise_unit(task(write_jsonl(["", *texts]), 7), recipe(tmp_path), tokenizer, nobody)
    assert (report.documents, report.empty) == (7, 1)


def test_a_bad_document_stops_the_unit_and_leaves_nothing_or_is_counted(
    tmp_path: Path, write_jsonl: Callable[..., Path], tokenizer: SentencePieceTokenizer, texts: list[str]
) -> None:
    path, units = write_jsonl([*texts[:2], "x" * 5000, "y" * 5000]), tmp_path / "units"
    units.mkdir()
    with pytest.raises(DataError, match=r"a\.jsonl line 3: .*--on-bad-document skip"):
        tokenise_unit(task(path), recipe(units, max_document_bytes=4000), tokenizer, nobody)
    assert list(units.iterdir()) == []
    report = tokenise_unit(task(path), recipe(units, max_document_bytes=4000, skip_bad=True), tokenizer, nobody)
    assert (report.documents, report.bad, report.max_document_bytes) == (2, 2, 4000)
    assert report.first_bad is not None and report.first_bad.startswith(f"{path} line 3: ")


def test_a_file_that_has_changed_is_refused(
    tmp_path: Path, write_jsonl: Callable[..., Path], tokenizer: SentencePieceTokenizer, texts: list[str]
) -> None:
    path = write_jsonl(texts)
    planned = task(path)
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(DataError, match=r"a\.jsonl changed"):
        tokenise_unit(planned, recipe(tmp_path), tokenizer, nobody)
    assert not unit_folder(tmp_path, 0).exists()
