from __future__ import annotations

import errno
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
import wids

from sleeptrain.data.shards import DamagedDocument, TokenShards
from sleeptrain.data.storage import Retries
from sleeptrain.data.tokenizer import Tokenizer
from sleeptrain.errors import DataError

AT_ONCE = Retries(attempts=3, first_wait=0)


def every(shards: TokenShards) -> list[tuple[int, int]]:
    return [(shard, index) for shard in range(shards.num_shards) for index in range(len(shards.lengths(shard)))]


def edit_index(folder: Path, change: Callable[[dict], object]) -> None:
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


def flip_byte(path: Path, position: int) -> None:
    """Damages a file and keeps its size and time."""
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 0xFF]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def offset(folder: Path, shard: int, index: int) -> int:
    return int(np.load(folder / f"shard-{shard:06d}.index.npy")["offset"][index])


def num_descriptors(folder: Path) -> int:
    opened = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            opened += str(folder) in os.readlink(link)
        except FileNotFoundError:
            continue
    return opened


def test_documents_come_back(shards: TokenShards, tokenizer: Tokenizer, texts: list[str]) -> None:
    assert shards.num_shards >= 3
    assert shards.num_documents == len(texts) == shards.shard_documents_S.sum()
    for (shard, index), text in zip(every(shards), texts, strict=True):
        document = shards.document(shard, index)
        assert document.dtype == np.uint16
        assert document.tolist() == [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        assert len(document) == shards.lengths(shard)[index]
    assert [shards.lengths(shard).sum() for shard in range(shards.num_shards)] == shards.shard_tokens_S.tolist()
    assert shards.num_tokens == shards.shard_tokens_S.sum()
    assert shards.lengths(0).dtype == shards.shard_tokens_S.dtype == shards.shard_documents_S.dtype == np.int64
    assert shards.num_bytes == sum(len(text.encode()) for text in texts)
    assert (shards.vocab_size, shards.tokenizer_hash) == (tokenizer.vocab_size, tokenizer.hash)


def test_no_such_document(shards: TokenShards) -> None:
    for shard, index in ((0, -1), (0, len(shards.lengths(0))), (-1, 0), (shards.num_shards, 0)):
        with pytest.raises(IndexError):
            shards.document(shard, index)


def test_document_is_read_only(shards: TokenShards) -> None:
    with pytest.raises(ValueError, match="read-only"):
        shards.document(0, 0)[0] = 1


def test_webdataset_reads_the_same(shards: TokenShards, folder: Path) -> None:
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"{index:09d}" for index in range(shards.num_documents)]
    for sample, (shard, index) in zip(samples, every(shards), strict=True):
        np.testing.assert_array_equal(sample["npy"], shards.document(shard, index))


@pytest.mark.filterwarnings("ignore:String specifications:UserWarning")
def test_wids_reads_the_same(shards: TokenShards, folder: Path, tmp_path: Path) -> None:
    dataset = wids.ShardListDataset(str(folder / "index.json"), cache_dir=str(tmp_path / "cache"))
    assert len(dataset) == shards.num_documents
    for number, (shard, index) in enumerate(every(shards)):
        np.testing.assert_array_equal(dataset[number][".npy"], shards.document(shard, index))


def test_wrong_tokenizer_names_both(folder: Path, tokenizer: Tokenizer) -> None:
    TokenShards(folder, expect_tokenizer=tokenizer.hash)
    with pytest.raises(DataError, match=rf"{tokenizer.hash}.*0123abc.*data\.shards\.tokenizer"):
        TokenShards(folder, expect_tokenizer="0123abc")


def test_the_fingerprint_depends_on_the_content_alone(shards: TokenShards, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    edit_index(tmp_path / "copy", lambda index: index.update(name="other", bytes=1))
    assert TokenShards(tmp_path / "copy").fingerprint == shards.fingerprint
    part = TokenShards(folder / "shard-{000000..000001}.tar")
    assert part.fingerprint != shards.fingerprint
    for change in (
        lambda index: index.update(tokenizer_sha256="x"),
        lambda index: index.update(dtype="<u4"),
        lambda index: index["shardlist"][1].update(sha256="0" * 64),
    ):
        edit_index(tmp_path / "copy", change)
        assert TokenShards(tmp_path / "copy").fingerprint != shards.fingerprint
        shutil.copy(folder / "index.json", tmp_path / "copy")


# Opening


def test_opening_reads_no_sidecar(folder: Path, tmp_path: Path) -> None:
    for path in folder.glob("*.npy"):
        path.unlink()
    shards = TokenShards(folder)
    with pytest.raises(DataError, match=r"shard-000001\.index\.npy: No such file.*tools/shards\.py index"):
        shards.lengths(1)
    with pytest.raises(DamagedDocument, match=r"shard-000001\.tar: document 0 cannot be read"):
        shards.document(1, 0)


@pytest.mark.parametrize("name", ["shard-000001.tar", "index.json"])
def test_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(DataError, match=rf"{name}: No such file"):
        TokenShards(folder)


@pytest.mark.parametrize("name", ["shard-000001.tar", "shard-000001.index.npy", "index.json"])
def test_a_file_that_is_not_plain_is_not_opened(folder: Path, name: str) -> None:
    """A process that opened the pipe would wait for ever."""
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(DataError, match=re.escape(name)):
        TokenShards(folder, retries=AT_ONCE).document(1, 0)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        TokenShards(tmp_path / "nowhere")


def test_bad_index_is_named(folder: Path) -> None:
    edit_index(folder, lambda index: index["shardlist"].reverse())
    with pytest.raises(DataError, match=r"index\.json: .*not sorted"):
        TokenShards(folder)


def test_pattern_reads_the_shards_it_names(shards: TokenShards, folder: Path) -> None:
    part = TokenShards(folder / "shard-{000001..000002}.tar")
    assert part.num_shards == 2
    assert part.num_documents == shards.shard_documents_S[1:3].sum()
    assert part.num_tokens == shards.shard_tokens_S[1:3].sum()
    assert part.num_bytes == shards.num_bytes * part.num_tokens // shards.num_tokens
    np.testing.assert_array_equal(part.document(0, 3), shards.document(1, 3))
    (folder / "shard-000000.tar").unlink()
    TokenShards(folder / "shard-{000001..000002}.tar")
    with pytest.raises(DataError, match=r"shard-000099\.tar is not in index\.json"):
        TokenShards(folder / "shard-{000001,000099}.tar")


# Damage


def test_flipped_token(shards: TokenShards, folder: Path) -> None:
    at = offset(folder, 1, 2)
    flip_byte(folder / "shard-000001.tar", at + 3)
    with pytest.raises(
        DamagedDocument, match=rf"shard-000001\.tar: document 2 .* at byte {at}, .*restore the file$"
    ) as e:
        shards.document(1, 2)
    assert (e.value.shard, e.value.index) == (1, 2)
    assert len(shards.document(1, 1)) == shards.lengths(1)[1]
    assert len(shards.document(1, 3)) == shards.lengths(1)[3]


def test_every_flipped_byte_of_a_document(shards: TokenShards, folder: Path) -> None:
    at, size = offset(folder, 0, 0), 2 * int(shards.lengths(0)[0])
    for position in range(at, at + size):
        flip_byte(folder / "shard-000000.tar", position)
        with pytest.raises(DamagedDocument):
            shards.document(0, 0)
        flip_byte(folder / "shard-000000.tar", position)
    shards.document(0, 0)


def test_flipped_byte_in_a_sidecar(folder: Path) -> None:
    shards = TokenShards(folder)
    path = folder / "shard-000001.index.npy"
    for position in (10, 130, path.stat().st_size - 1):
        flip_byte(path, position)
        with pytest.raises(DataError, match=r"shard-000001\.index\.npy: does not match its sha256.*tools/shards\.py"):
            shards.lengths(1)
        flip_byte(path, position)
    shards.lengths(1)


@pytest.mark.parametrize(
    ("field", "change", "message"), [("nsamples", 1, "other documents"), ("tokens", 2, "other tokens")]
)
def test_sidecar_of_other_documents(folder: Path, field: str, change: int, message: str) -> None:
    def move(index: dict) -> None:
        for shard, sign in zip(index["shardlist"], (1, -1), strict=False):
            shard[field] += sign * change

    edit_index(folder, move)
    with pytest.raises(DataError, match=rf"shard-000000\.index\.npy: holds {message} than index\.json says"):
        TokenShards(folder).lengths(0)


def test_shard_cut_while_in_use(shards: TokenShards, folder: Path) -> None:
    shards.document(0, 0)
    os.truncate(folder / "shard-000000.tar", offset(folder, 0, 3) + 2)
    shards.document(0, 2)
    with pytest.raises(DamagedDocument, match=r"shard-000000\.tar: document 3"):
        shards.document(0, 3)


def test_shard_removed_before_use(folder: Path) -> None:
    shards = TokenShards(folder, retries=AT_ONCE)
    (folder / "shard-000000.tar").unlink()
    at = offset(folder, 0, 1)
    with pytest.raises(DamagedDocument, match=rf"shard-000000\.tar: document 1, at byte {at}, .*No such file"):
        shards.document(0, 1)
    shards.document(1, 0)


def test_a_mismatch_is_read_a_second_time(shards: TokenShards, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second read has another descriptor: a network file system may have answered from its own cache."""
    expected = shards.document(0, 0).tolist()
    pread, used = os.pread, []

    def first_time_wrong(descriptor: int, size: int, offset: int) -> bytes:
        used.append(os.fstat(descriptor).st_ino)
        content = pread(descriptor, size, offset)
        return content if len(used) > 1 else bytes(size)

    monkeypatch.setattr(os, "pread", first_time_wrong)
    opened = shards._open.get(0)
    assert shards.document(0, 0).tolist() == expected
    assert len(used) == 2
    assert shards._open.get(0) is not opened


def test_failing_disk_is_tried_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = TokenShards(folder, retries=AT_ONCE)
    expected = shards.document(0, 0).tolist()
    pread, failures = os.pread, [3]

    def failing(descriptor: int, size: int, offset: int) -> bytes:
        if failures[0]:
            failures[0] -= 1
            raise OSError(errno.EIO, "Input/output error")
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", failing)
    assert shards.document(0, 0).tolist() == expected
    failures[0] = 4
    with pytest.raises(DamagedDocument, match=r"shard-000000\.tar: document 0, .*Input/output error"):
        shards.document(0, 0)
    assert shards.document(0, 0).tolist() == expected  # the shard is not given up for one failure


# Many shards, many threads


def test_held_shards_are_bounded(folder: Path) -> None:
    shards = TokenShards(folder, open_shards=2)
    for _ in range(2):
        for shard, index in every(shards):
            shards.document(shard, index)
    assert num_descriptors(folder) == 2
    del shards
    assert num_descriptors(folder) == 0


def test_several_threads_read_what_one_reads(folder: Path) -> None:
    shards = TokenShards(folder, open_shards=2)
    which = every(shards)
    expected = {(shard, index): shards.document(shard, index).tolist() for shard, index in which}
    wrong: list[object] = []

    def read(seed: int) -> None:
        try:
            for number in np.random.default_rng(seed).integers(len(which), size=300).tolist():
                shard, index = which[number]
                shards.prefetch(shard)
                if shards.document(shard, index).tolist() != expected[shard, index]:
                    wrong.append((shard, index))
                shards.lengths(shard)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    while any(thread.name == "prefetch" for thread in threading.enumerate()):
        time.sleep(0.01)
    assert num_descriptors(folder) == 2
