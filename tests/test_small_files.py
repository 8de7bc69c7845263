"""JSON and YAML that may be a stranger's: size, depth and the expansion of aliases are bounded."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from sleeptrain import small_files
from sleeptrain.errors import DataError
from sleeptrain.small_files import DEPTH, compose_yaml, parse_json, parse_yaml, read_bounded, read_json

FAR = 100_000


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels


@pytest.mark.parametrize("text", [nested(FAR), '{"a":' * FAR + "1" + "}" * FAR, "[" * FAR, nested(DEPTH + 2)])
def test_deep_json_is_refused(text: str) -> None:
    for content in (text, text.encode()):
        with pytest.raises(ValueError, match="it is nested deeper than 64 levels"):
            parse_json(content)


def test_json_up_to_the_bound_is_read() -> None:
    text = '{"a": ' + nested(DEPTH - 1) + "}"
    assert parse_json(text) == json.loads(text)
    wide = json.dumps([[{}] * 3] * 100)
    assert parse_json(wide.encode()) == json.loads(wide)


def test_brackets_in_texts_do_not_count() -> None:
    assert parse_json(json.dumps({"a": nested(FAR)})) == {"a": nested(FAR)}


def test_large_files_are_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}')
    assert read_json(path, "make it anew") == {"a": 1}
    monkeypatch.setattr(small_files, "SETTINGS_BYTES", 7)
    monkeypatch.setattr(small_files, "JSON_BYTES", 7)
    monkeypatch.setattr(Path, "read_bytes", None)
    with pytest.raises(DataError, match=r"a\.json is not .*: it has 8 bytes, more than the 7 that are read; make it"):
        read_json(path, "make it anew")
    with pytest.raises(ValueError, match="it has 8 bytes, more than the 7"):
        parse_json('{"a": 1}')


@pytest.mark.parametrize(
    ("content", "word"),
    [(b"", "Expecting value"), (b"[1]", "no object"), (b"\xff", "utf-8"), (b'{"a": 1', "delimiter")],
)
def test_json_without_an_object_is_refused_with_the_way_out(tmp_path: Path, content: bytes, word: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.json is not the JSON that it should be: .*{word}.*; make it anew"):
        read_json(tmp_path / "a.json", "make it anew")


def test_a_file_that_is_not_plain_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for read in (lambda path: read_json(path, ""), lambda path: read_bounded(path, 10)):
        with pytest.raises(DataError, match="is no plain file"):
            read(tmp_path / "pipe")
    with pytest.raises(DataError, match=r"absent cannot be read: No such file.*; make it anew"):
        read_json(tmp_path / "absent", "make it anew")


def laughs(levels: int, times: int = 10) -> str:
    rows = [f"a0: &a0 [{', '.join('x' * times)}]"]
    return "\n".join(rows + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * times)}]" for n in range(1, levels)])


def chain(levels: int) -> str:
    """Each alias is a level deeper than the one before, though no level stands inside another in the file."""
    return "\n".join(["a0: &a0 []", *(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, levels))])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: &a [*a]", "an alias in it refers to a part of the file that contains it"),
        ("&a {b: {c: *a}}", "an alias in it refers to a part of the file that contains it"),
        (laughs(12), "its aliases expand it to more than 100,000 values"),
        ("a0: &a0 {x: 1}\n" + "\n".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 12)),
         "its aliases expand it"),
        (chain(DEPTH + 5), "nested deeper than 64 levels"),
        (nested(600), "nested deeper than 64 levels"),
        (nested(DEPTH + 2), "nested deeper than 64 levels"),
        ("\n".join("  " * n + "a:" for n in range(DEPTH + 2)), "nested deeper than 64 levels"),
    ],
)  # fmt: skip
def test_yaml_that_expands_is_refused(text: str, why: str) -> None:
    for parse in (parse_yaml, compose_yaml):
        with pytest.raises(yaml.YAMLError, match=why):
            parse(text)


def test_plain_aliases_are_read() -> None:
    text = "a: &a {b: [1, 2]}\nc: [*a, *a]\nd: {<<: *a, e: 3}"
    assert parse_yaml(text) == yaml.safe_load(text)
    assert parse_yaml(chain(DEPTH - 1)) and parse_yaml(laughs(4))
    assert parse_yaml("") is None


def test_large_yaml_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(yaml.YAMLError, match="more than the 262,144 that are read"):
        parse_yaml("a" * (small_files.YAML_BYTES + 1))
