"""Places in object stores: their names, their errors, and that short operations are tried again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from sleeptrain.errors import DataError
from sleeptrain.remote import Retries, UrlPath, check_protocol, named_place
from tests.checkpoint.stores import reset_memory


@pytest.fixture
def place() -> Iterator[UrlPath]:
    reset_memory()
    yield UrlPath("memory://bucket/a")
    reset_memory()


def test_a_name_is_a_url_or_a_local_path() -> None:
    assert named_place("runs/r") == Path("runs/r")
    assert named_place("s3://bucket/runs/") == UrlPath("s3://bucket/runs")
    place = UrlPath("s3://key:secret@bucket/runs") / "r"
    assert (place.name, place.parent.name, place.with_name("s").url) == ("r", "runs", "s3://key:secret@bucket/runs/s")
    assert str(place) == "s3://***@bucket/runs/r"


def test_files_are_written_listed_read_copied_and_removed(place: UrlPath) -> None:
    (place / "x" / "one").write_bytes(b"0123456789")
    with (place / "x" / "two").create() as file:
        file.write(b"abc")
    assert sorted(path.url for path in place.glob("*/*")) == [f"{place.url}/x/one", f"{place.url}/x/two"]
    assert (place / "x" / "two").read_bytes() == b"abc" and (place / "x" / "one").read_range(3, 4) == b"3456"
    assert (place / "x" / "one").stat().st_size == 10
    assert (place / "x").is_dir() and (place / "x" / "one").is_file() and not (place / "x").is_file()
    (place / "x").copy_tree(place / "y")
    (place / "x").remove_tree()
    assert [path.name for path in place.glob("*/*")] == ["one", "two"] and not (place / "x").exists()
    (place / "y" / "one").unlink()
    (place / "y" / "one").unlink(missing_ok=True)
    assert (place / "none").glob("*") == []
    (place / "none").remove_tree()


def test_what_is_missing_or_too_short_is_an_os_error(place: UrlPath) -> None:
    for action in ((place / "x").read_bytes, (place / "x").stat, (place / "x").unlink):
        with pytest.raises(FileNotFoundError) as caught:
            action()
        assert caught.value.filename == "memory://bucket/a/x"
    (place / "x").write_bytes(b"0123")
    with pytest.raises(OSError, match="ends after 4 bytes"):
        (place / "x").read_range(2, 3)


def test_any_error_of_a_store_becomes_an_os_error_and_is_tried_again(
    place: UrlPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "x").write_bytes(b"0123")
    plain, calls = MemoryFileSystem.cat_file, [0]
    monkeypatch.setattr(time, "sleep", lambda _: None)

    def broken(*_: object, **__: object) -> bytes:
        raise ValueError("the server is\nbusy at https://user:secret@host/x")

    def twice_broken(*args: object, **kwargs: object) -> bytes:
        calls[0] += 1
        return broken() if calls[0] < 3 else plain(*args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", twice_broken)
    assert (place / "x").read_bytes() == b"0123"
    monkeypatch.setattr(MemoryFileSystem, "cat_file", broken)
    with pytest.raises(OSError) as caught:
        UrlPath("memory://key:secret@bucket/x").read_bytes()
    assert "busy at https://***@host/x" in str(caught.value) and "secret" not in str(caught.value)


def test_waits_grow_and_what_is_final_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    calls = []

    def fail(error: OSError) -> None:
        calls.append(1)
        raise error

    with pytest.raises(OSError, match="broken"):
        Retries(attempts=4, first_wait=0.5).run(lambda: fail(OSError("broken")), "x", OSError)
    assert (len(calls), waits) == (4, [0.5, 1.0, 2.0])
    with pytest.raises(OSError, match="broken"):
        Retries().run(lambda: fail(OSError("broken")), "x", ValueError)
    assert len(calls) == 5
    with pytest.raises(FileNotFoundError):
        Retries().run(lambda: fail(FileNotFoundError("gone")), "x", OSError)
    assert len(calls) == 6


def test_a_protocol_that_cannot_be_opened_is_refused() -> None:
    with pytest.raises(DataError, match=r"^nosuch://\*\*\*@x: fsspec cannot open nosuch:// here"):
        check_protocol("nosuch://u:p@x", lambda text: text.replace("u:p", "***"))
    check_protocol("memory://x", str)
