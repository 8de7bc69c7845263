from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from sleeptrain.errors import DataError
from sleeptrain.prepare.inputs import named_inputs
from sleeptrain.prepare.readers import Bad, documents, locate
from sleeptrain.prepare.units import Slice, plan_units

UNIT_SIZES = (1, 7, 50, 333, 10**6)
HARD = ["one", "two\nlines\r\n", "  é漢😀\u2028 \u2581", "\x00\x1f", 'quote " and \\', "x" * 70_000, "last\n"]


def jsonl(texts: list[str], field: str = "text") -> bytes:
    # Half of the texts are escaped: both forms are JSON.
    lines = [json.dumps({"id": i, field: text}, ensure_ascii=bool(i % 2)) for i, text in enumerate(texts)]
    return "\n".join(lines).encode() + b"\n"


def parquet(texts: list[str | None], path: Path, rows: int = 2, type: pyarrow.DataType | None = None) -> None:
    table = pyarrow.table({"id": list(range(len(texts))), "text": pyarrow.array(texts, type or pyarrow.string())})
    pyarrow.parquet.write_table(table, path, row_group_size=rows)


def frames(content: bytes) -> bytes:
    """zstd in two frames, the first without its size."""
    middle = len(content) // 2
    first = zstandard.ZstdCompressor().compressobj()
    return first.compress(content[:middle]) + first.flush() + zstandard.ZstdCompressor().compress(content[middle:])


def slices(path: Path, unit_bytes: int = 10**9, document: str = "file", text_field: str = "text") -> list[Slice]:
    units = plan_units(named_inputs([str(path)], document), text_field, unit_bytes)
    return [part for unit in units for part in unit.slices]


def read(path: Path, unit_bytes: int = 10**9, document: str = "file") -> list[str | Bad]:
    return [text for part in slices(path, unit_bytes, document) for text in documents(part, "text")]


PACK: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": frames}


@pytest.mark.parametrize("unit_bytes", UNIT_SIZES[1:])
@pytest.mark.parametrize("suffix", PACK)
def test_json_lines_in_every_packing_and_cut(tmp_path: Path, suffix: str, unit_bytes: int) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    for content in (jsonl(HARD), jsonl(HARD)[:-1]):
        path.write_bytes(PACK[suffix](content))
        assert read(path, unit_bytes) == HARD


@pytest.mark.parametrize("unit_bytes", UNIT_SIZES)
def test_lines_belong_to_one_slice_each(tmp_path: Path, unit_bytes: int) -> None:
    lines = ["", "a", "", "", "bc" * 20, "é", "d\u2028e\x0bf", "last"]
    for end in ("", "\n"):
        (tmp_path / "a.txt").write_text("\n".join(lines) + end)
        assert read(tmp_path / "a.txt", unit_bytes, "line") == lines


def test_windows_line_ends_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntw\ro\r\n")
    assert read(tmp_path / "a.txt", document="line") == ["one", "tw\ro"]


@pytest.mark.parametrize("unit_bytes", UNIT_SIZES)
@pytest.mark.parametrize("type", [pyarrow.string(), pyarrow.large_string()])
def test_parquet_by_row_groups(tmp_path: Path, unit_bytes: int, type: pyarrow.DataType) -> None:
    parquet(list(HARD), tmp_path / "a.parquet", type=type)
    assert read(tmp_path / "a.parquet", unit_bytes) == HARD


@pytest.mark.parametrize("suffix", PACK)
def test_a_file_is_one_document_as_it_is(tmp_path: Path, suffix: str) -> None:
    text = "\ufeff\ttwo\r\n  é\n\n" * 100_000
    (tmp_path / f"a.md{suffix}").write_bytes(PACK[suffix](text.encode()))
    assert read(tmp_path / f"a.md{suffix}", 64) == [text]


BAD_LINES = [
    (b'{"text": "cut', "not JSON"),
    (b'["text"]', "no field 'text'"),
    (b'{"body": "x"}', "it has body"),
    (b'{"text": null}', "is no string"),
    (b'{"text": 3}', "is no string"),
    (b'{"text": "\\ud800"}', "lone surrogate"),
    (b'{"text": "\xff"}', "not JSON"),
    (b"[" * 100_000, "not JSON"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
@pytest.mark.parametrize("unit_bytes", [10, 10**9])
def test_bad_lines_are_reported_with_their_number(tmp_path: Path, line: bytes, reason: str, unit_bytes: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n')
    found = [(part, text) for part in slices(path, unit_bytes) for text in documents(part, "text")]
    texts = [text for _, text in found]
    assert [texts[0], texts[1], texts[3]] == ["a", "", "b"]
    part, bad = found[2]
    assert isinstance(bad, Bad) and reason in bad.reason
    assert locate(part, bad) == f"{path} line 3"


def test_bad_texts_and_rows_are_reported_with_their_place(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good\nb\xffd\ngood\n")
    (part,) = slices(tmp_path / "a.txt", document="line")
    bad = list(documents(part, "text"))[1]
    assert isinstance(bad, Bad) and "not UTF-8" in bad.reason
    assert locate(part, bad) == f"{tmp_path}/a.txt line 2"
    (part,) = slices(tmp_path / "a.txt")
    (bad,) = documents(part, "text")
    assert isinstance(bad, Bad) and locate(part, bad) == f"{tmp_path}/a.txt"
    parquet(["a", "b", "c", None, "d"], tmp_path / "a.parquet")
    part = slices(tmp_path / "a.parquet", 1)[1]
    good, bad = documents(part, "text")
    assert good == "c" and isinstance(bad, Bad) and locate(part, bad) == f"{tmp_path}/a.parquet row 4"


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_junk_and_vanished_files_are_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"junk" * 100)
    with pytest.raises(DataError, match=name):
        read(path)
    parquet(["a"], tmp_path / "b.parquet")
    parts = slices(tmp_path / "b.parquet") if name == "a.parquet" else slices(path)
    parts[0].source.path.unlink()
    with pytest.raises(DataError, match=parts[0].source.name):
        list(documents(parts[0], "text"))


def test_optional_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in (("pyarrow", "a.parquet"), ("zstandard", "a.jsonl.zst")):
        (tmp_path / name).write_bytes(b"x")
        monkeypatch.setitem(__import__("sys").modules, module, None)
        with pytest.raises(DataError, match=rf"{name}: {module} is not installed: pip install 'sleeptrain\[data\]'"):
            read(tmp_path / name)
