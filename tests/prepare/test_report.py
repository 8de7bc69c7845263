"""Counts of a preparation: their sums, and reports that are read as they were written."""

from __future__ import annotations

from pathlib import Path

import pytest

from sleeptrain.data.shard_index import Shard
from sleeptrain.errors import DataError
from sleeptrain.prepare.report import Tally, UnitReport, total


def shard(number: int) -> Shard:
    return Shard(f"shard-{number:06d}.tar", 1, 512, "0" * 64, 3, "1" * 64)


def unit(documents: list[tuple[int, int]], shards: int = 1, **more: object) -> UnitReport:
    """A unit from (tokens, bytes) of each document of the train side."""
    report = UnitReport(max_document_bytes=100, **more)  # type: ignore[arg-type]
    for tokens, num_bytes in documents:
        report.sides["train"].add(tokens, num_bytes)
    report.sides["train"].shards = [shard(number) for number in range(shards)]
    return report


def test_a_side_counts_documents_and_the_longest() -> None:
    tally = Tally()
    for tokens, num_bytes in ((3, 10), (9, 30), (4, 11)):
        tally.add(tokens, num_bytes)
    assert tally.summary() == {"documents": 3, "tokens": 16, "bytes_per_token": 3.188, "longest": 9}
    assert Tally().summary()["bytes_per_token"] == 0.0


def test_a_total_is_the_sum_with_the_longest_and_the_first_bad() -> None:
    reports = [
        unit([(3, 10)], empty=1),
        unit([(9, 30), (2, 5)], 2, bad=1, first_bad="a"),
        unit([], 0, bad=2, first_bad="b"),
    ]
    found = total(reports)
    train = found.sides["train"]
    assert (train.documents, train.tokens, train.num_bytes, train.longest) == (3, 14, 45, 9)
    assert train.shards == [shard(0), shard(0), shard(1)]
    assert (found.empty, found.bad, found.first_bad, found.max_document_bytes) == (1, 3, "a", 0)
    assert (found.documents, found.num_bytes) == (3, 45)
    assert total([]) == UnitReport()


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    report = unit([(3, 10)], 2, bad=1, first_bad="é line 3")
    (tmp_path / "report.json").write_bytes(report.to_json())
    assert UnitReport.read(tmp_path / "report.json") == report


def test_the_message_about_a_damaged_report_has_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes(unit([]).to_json().replace(b'"bad": 0', b'"bad": -1'))
    with pytest.raises(DataError, match=r"report\.json .* its bad is -1; make it anew with --force"):
        UnitReport.read(tmp_path / "report.json")
