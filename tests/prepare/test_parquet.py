"""Text columns of parquet files."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from sleeptrain.errors import DataError
from sleeptrain.prepare.inputs import Source, named_inputs
from sleeptrain.prepare.parquet import row_group_bytes, rows
from tests.prepare.test_readers import parquet, slices


def test_parquet_columns_that_do_not_fit(tmp_path: Path) -> None:
    parquet(["a"], tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"has no column 'body'.*its columns: id, text"):
        slices(tmp_path / "a.parquet", text_field="body")
    with pytest.raises(DataError, match="'id' holds int64, no strings"):
        slices(tmp_path / "a.parquet", text_field="id")


def source(path: Path) -> Source:
    (found,) = named_inputs([str(path)])
    return found


def test_rows_are_numbered_through_the_file_whatever_groups_are_read(tmp_path: Path) -> None:
    parquet(["a", None, "é", "d", ""], tmp_path / "a.parquet")
    read = list(rows(source(tmp_path / "a.parquet"), "text", 1, 3))
    assert [(number, value.to_pybytes().decode()) for number, value in read] == [(3, "é"), (4, "d"), (5, "")]
    (_, first), second = rows(source(tmp_path / "a.parquet"), "text", 0, 1)
    assert first.to_pybytes() == b"a" and second == (2, None)


def test_the_size_of_a_group_is_that_of_its_text_alone(tmp_path: Path) -> None:
    texts = ["x" * 1000, "y" * 1000, "z"]
    parquet(list(texts), tmp_path / "a.parquet")
    first, second = row_group_bytes(source(tmp_path / "a.parquet"), "text")
    table = pyarrow.table({"other": ["w" * 10**5] * 3, "text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet", row_group_size=2)
    assert row_group_bytes(source(tmp_path / "b.parquet"), "text") == [first, second]
    assert first >= 2000 > 100 > second


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pyarrow.table([["a"], ["b"]], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has 2 column 'text'"):
        row_group_bytes(source(tmp_path / "a.parquet"), "text")
