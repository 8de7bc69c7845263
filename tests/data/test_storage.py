from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest

from sleeptrain.data.shards import DamagedDocument, TokenShards
from sleeptrain.data.storage import Cache, LocalFolder, RemoteFolder, Retries, locate
from sleeptrain.errors import ConfigError, DataError
from tests.data.waiting import wait_until_idle

AT_ONCE = Retries(attempts=3, first_wait=0)


def copies(cache: Cache) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in cache.path.iterdir() if path.is_file()}


def assert_same(found: TokenShards, expected: TokenShards) -> None:
    assert found.fingerprint == expected.fingerprint
    for shard in range(expected.num_shards):
        for index, length in enumerate(expected.lengths(shard)):
            assert length == found.lengths(shard)[index]
            np.testing.assert_array_equal(found.document(shard, index), expected.document(shard, index))


def where(location: str, cache: Cache) -> tuple[str, list[str] | None]:
    storage, names = locate(location, cache, AT_ONCE)
    return storage.where("index.json"), names


# Locations


def test_locations(folder: Path, cache: Cache) -> None:
    two = ["shard-08.tar", "shard-09.tar"]
    assert where(str(folder), cache) == (f"{folder}/index.json", None)
    assert where("memory://b/train/", cache) == ("memory://b/train/index.json", None)
    assert where(f"{folder}/shard-{{08..09}}.tar", cache) == (f"{folder}/index.json", two)
    assert where("memory://b/train/shard-{08,09}.tar", cache) == ("memory://b/train/index.json", two)
    assert where("memory://h/shard-{08..09}.tar?key=/x", cache) == ("memory://h/index.json?key=/x", two)
    assert where("pipe:cp s3://b/t/shard-{08..09}.tar -", cache) == ("pipe:cp s3://b/t/index.json -", two)
    assert where("pipe:get '${HOST}/shard-0{8..9}.tar' | cat", cache) == ("pipe:get '${HOST}/index.json' | cat", two)
    assert where("pipe:cat a{1..2}{3,4}.tar", cache) == ("pipe:cat index.json", [f"a{n}.tar" for n in (13, 14, 23, 24)])


@pytest.mark.parametrize(
    "location",
    [
        "pipe:cat shard-000000.tar",
        "memory://{a,b}/shard-000000.tar",
        "memory://{a,b}/shard-{0..1}.tar",
        "/data/shard-{0..1}.tar -",
    ],
)
def test_patterns_that_are_refused(location: str, cache: Cache) -> None:
    with pytest.raises(ConfigError, match="braces"):
        locate(location, cache, AT_ONCE)


def test_missing_locations_are_refused(folder: Path, cache: Cache) -> None:
    with pytest.raises(DataError, match=r"shard-000000\.tar is a file; name its folder"):
        locate(folder / "shard-000000.tar", cache, AT_ONCE)
    with pytest.raises(DataError, match="no such folder"):
        locate(folder / "no" / "shard-{0..1}.tar", cache, AT_ONCE)
    with pytest.raises(DataError, match="nowhere:// here"):
        locate("nowhere://bucket", cache, AT_ONCE)
    with pytest.raises(DataError, match=r"memory://nothing/index\.json: cannot be fetched in 3 attempts"):
        TokenShards("memory://nothing", cache=cache, retries=AT_ONCE)
    (folder / "file").touch()
    with pytest.raises(DataError, match=r"cannot be kept here.*data\.shards\.cache"):
        locate("memory://bucket", Cache(folder / "file"), AT_ONCE)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLEEPTRAIN_CACHE", raising=False)
    assert Cache().path == Path.home() / ".cache/sleeptrain/shards"
    monkeypatch.setenv("SLEEPTRAIN_CACHE", "/scratch/a")
    assert Cache().path == Path("/scratch/a")
    assert Cache("/scratch/b").path == Path("/scratch/b")


# Object stores


def test_object_store_gives_the_same(shards: TokenShards, memory: str, cache: Cache) -> None:
    assert_same(TokenShards(memory, cache=cache), shards)
    assert len(copies(cache)) == 2 * shards.num_shards
    part = TokenShards(f"{memory}/shard-{{000001..000002}}.tar", cache=cache)
    np.testing.assert_array_equal(part.document(0, 0), shards.document(1, 0))


def test_file_url_gives_the_same(shards: TokenShards, folder: Path, cache: Cache) -> None:
    assert_same(TokenShards(f"file://{folder}", cache=cache), shards)


def test_opening_fetches_the_index_only(memory: str, cache: Cache) -> None:
    shards = TokenShards(memory, cache=cache)
    assert copies(cache) == {}
    shards.lengths(0)
    assert len(copies(cache)) == 1


def test_copies_are_used_again(shards: TokenShards, memory: str, cache: Cache) -> None:
    assert_same(TokenShards(memory, cache=cache), shards)
    remote = TokenShards(memory, cache=cache, retries=AT_ONCE)
    fsspec.filesystem("memory").rm(f"{memory}/shard-000000.tar")
    assert_same(remote, shards)


def test_changed_object_is_refused(memory: str, cache: Cache) -> None:
    remote = TokenShards(memory, cache=cache, retries=AT_ONCE)
    filesystem = fsspec.filesystem("memory")
    content = filesystem.cat(f"{memory}/shard-000000.tar")
    for damaged in (content[:-1], content[:5000] + b"x" + content[5001:]):
        filesystem.pipe(f"{memory}/shard-000000.tar", damaged)
        with pytest.raises(DamagedDocument, match=r"/shard-000000\.tar: cannot be fetched.*do not match the sha256"):
            TokenShards(memory, cache=cache, retries=AT_ONCE).document(0, 0)
    assert len(copies(cache)) == 1  # the sidecar; no copy of the shard stays, whole or partial
    remote.document(1, 0)


def test_damaged_copy_is_fetched_anew(shards: TokenShards, memory: str, cache: Cache) -> None:
    TokenShards(memory, cache=cache).document(0, 0)
    for path in cache.path.iterdir():
        if path.is_file():
            path.write_bytes(bytes(path.stat().st_size))
    np.testing.assert_array_equal(TokenShards(memory, cache=cache).document(0, 0), shards.document(0, 0))


def test_shard_that_fails_does_not_delay_each_document(
    memory: str, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = TokenShards(memory, cache=cache, retries=AT_ONCE)
    filesystem = fsspec.filesystem("memory")
    content = filesystem.cat(f"{memory}/shard-000000.tar")
    filesystem.rm(f"{memory}/shard-000000.tar")
    attempts = []
    stream = RemoteFolder._stream

    def counted(self: RemoteFolder, name: str):
        attempts.append(name)
        return stream(self, name)

    monkeypatch.setattr(RemoteFolder, "_stream", counted)
    for index in range(3):
        with pytest.raises(DamagedDocument, match="cannot be fetched"):
            remote.document(0, index)
    assert attempts.count("shard-000000.tar") == 3
    filesystem.pipe(f"{memory}/shard-000000.tar", content)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 100)
    remote.document(0, 0)


def test_least_recently_used_copies_are_removed(shards: TokenShards, memory: str, cache: Cache) -> None:
    sizes = {shard.sha256: shard.filesize for shard in shards.shards}
    names = [shard.sha256 for shard in shards.shards]
    small = Cache(cache.path, gib=(sizes[names[0]] + sizes[names[1]] + 3_000) / 2**30)
    remote = TokenShards(memory, cache=small, open_shards=1)
    for age, shard in enumerate((0, 1)):
        remote.document(shard, 0)
        for path in small.path.iterdir():
            if path.name == names[shard]:
                os.utime(path, (1000 + age, 1000 + age))
    remote.document(0, 0)  # used last now
    remote.document(2, 0)
    assert names[0] in copies(small)
    assert names[1] not in copies(small)
    assert sum(copies(small).values()) <= small.gib * 2**30
    assert_same(TokenShards(memory, cache=Cache(cache.path, gib=1e-9)), shards)


def test_abandoned_partial_copies_are_removed(memory: str, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Partial copies of other processes stay, though this machine's clock is a day ahead of the file system's."""
    date = time.time
    monkeypatch.setattr(time, "time", lambda: date() + 86_400)
    remote = TokenShards(memory, cache=Cache(cache.path, gib=1e-9))
    old, new = (f".{digit * 64}.partial-{digit * 8}" for digit in "01")
    for name, age in ((old, 7200), (new, 0), ("thesis.tex", 7200)):
        (cache.path / name).write_bytes(b"x")
        os.utime(cache.path / name, (date() - age,) * 2)
    remote.document(0, 0)
    assert old not in copies(cache) and new in copies(cache)
    assert "thesis.tex" in copies(cache), "what is no copy of a shard is none of the cache's"


def test_one_fetches_and_the_others_wait(folder: Path, cache: Cache, tmp_path: Path) -> None:
    log = tmp_path / "log"
    pipe = f"pipe:echo x >> {log}; sleep 0.2; cat {folder}/shard-{{000000..000000}}.tar"
    opened = [TokenShards(pipe, cache=cache) for _ in range(4)]
    log.unlink()
    threads = [threading.Thread(target=shards.document, args=(0, 0)) for shards in opened]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert log.read_text().count("x") == 2  # the shard and its sidecar


# Commands


def test_pipe_gives_the_same(shards: TokenShards, folder: Path, cache: Cache) -> None:
    last = shards.num_shards - 1
    assert_same(TokenShards(f"pipe:cat {folder}/shard-{{000000..{last:06d}}}.tar", cache=cache), shards)


def flaky(folder: Path, counter: Path, failures: int, otherwise: str) -> str:
    """A command that does `otherwise` the first `failures` times, and then writes the file."""
    counter.write_text("0")
    name = f"{folder}/shard-{{000000..000000}}.tar"
    fail = f"n=$(cat {counter}); echo $((n + 1)) > {counter}; [ $n -lt {failures} ] && {{ {otherwise}; }}"
    return f"pipe:f={name}; case $f in *.json) ;; *) {fail};; esac; cat $f"


@pytest.mark.parametrize("otherwise", ["echo no route >&2; exit 7", "head -c 100 $f; exit 7", "head -c 100 $f; exit 0"])
def test_pipe_that_fails_twice(otherwise: str, shards: TokenShards, folder: Path, cache: Cache, tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    remote = TokenShards(flaky(folder, counter, 2, otherwise), cache=cache, retries=AT_ONCE)
    assert len(remote.lengths(0)) == shards.shard_documents_S[0]
    assert int(counter.read_text()) == 3
    np.testing.assert_array_equal(remote.document(0, 0), shards.document(0, 0))
    assert int(counter.read_text()) == 4


def test_pipe_that_always_fails(cache: Cache, tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    with pytest.raises(DataError, match=r"pipe:.*in 3 attempts \(exit status 7: no route\)"):
        TokenShards(f"pipe:echo x >> {counter}; echo no route >&2; exit 7; {{0..1}}", cache=cache, retries=AT_ONCE)
    assert counter.read_text().count("x") == 3


def test_pipe_that_cuts_the_file(folder: Path, cache: Cache, tmp_path: Path) -> None:
    cut = f"pipe:f={folder}/shard-{{000000..000000}}.tar; case $f in *.tar) head -c 1000 $f;; *) cat $f;; esac"
    remote = TokenShards(cut, cache=cache, retries=AT_ONCE)
    with pytest.raises(DamagedDocument, match=r"in 3 attempts \(the 1000 bytes that came do not match the sha256"):
        remote.document(0, 0)


# Ahead of need


def test_prefetch_brings_both_files(shards: TokenShards, memory: str, cache: Cache) -> None:
    remote = TokenShards(memory, cache=cache)
    remote.prefetch(1)
    wait_until_idle()
    described = shards.shards[1]
    assert set(copies(cache)) == {described.sha256, described.index_sha256}


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no posix_fadvise")
def test_local_prefetch_advises_the_system(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advised: list[tuple[str, int]] = []

    def fadvise(descriptor: int, offset: int, length: int, advice: int) -> None:
        advised.append((os.readlink(f"/proc/self/fd/{descriptor}"), advice))

    monkeypatch.setattr(os, "posix_fadvise", fadvise)
    LocalFolder(folder).prefetch("shard-000000.tar", "")
    assert advised == [(str(folder / "shard-000000.tar"), os.POSIX_FADV_WILLNEED)]
