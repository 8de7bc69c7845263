"""The longest document: up to it every format gives the text; longer ones give their place and take no memory."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from sleeptrain.data.shards import TokenShards
from sleeptrain.data.tokenizer import SentencePieceTokenizer
from sleeptrain.errors import DataError
from sleeptrain.prepare.inputs import named_inputs
from sleeptrain.prepare.job import Job, prepare
from sleeptrain.prepare.readers import Bad, documents, locate
from sleeptrain.prepare.split import SIDES, side
from tests.prepare.documents import all_documents
from tests.prepare.test_job import documents as documents_of
from tests.prepare.test_job import killed
from tests.prepare.test_readers import PACK, jsonl, parquet, slices

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
LONG = "é" * 30  # 60 bytes


def read(path: Path, max_bytes: int, unit_bytes: int = 10**9, document: str = "file") -> list[str]:
    """The texts, and the place and reason of each bad one."""
    found = []
    for part in slices(path, unit_bytes, document):
        for text in documents(part, "text", max_bytes):
            found.append(f"{locate(part, text)} {text.reason}" if isinstance(text, Bad) else text)
    return found


def refused(place: str, size: str, max_bytes: int) -> str:
    return f"{place} it has {size} bytes, more than --max-document-bytes {max_bytes}, which can be raised"


@pytest.mark.parametrize("unit_bytes", [7, 25, 10**9])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("suffix", PACK)
def test_lines_at_and_above_it(tmp_path: Path, suffix: str, end: bytes, unit_bytes: int) -> None:
    path = tmp_path / f"a.txt{suffix}"
    for last in (b"", end):
        path.write_bytes(PACK[suffix](end.join([b"one", LONG.encode(), b"", b"two"]) + last))
        for longest in (60, 61, 10**9):
            assert read(path, longest, unit_bytes, "line") == ["one", LONG, "", "two"]
        for longest in (3, 10, 58, 59):
            bad = refused(f"{path} line 2", "60", longest)
            assert read(path, longest, unit_bytes, "line") == ["one", bad, "", "two"]


@pytest.mark.parametrize("suffix", PACK)
def test_a_long_last_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.txt{suffix}"
    for end in (b"", b"\n", b"\r\n"):
        path.write_bytes(PACK[suffix](b"one\n" + LONG.encode() + end))
        assert read(path, 59, document="line") == ["one", refused(f"{path} line 2", "60", 59)]
        assert read(path, 60, document="line") == ["one", LONG]


@pytest.mark.parametrize("unit_bytes", [30, 10**9])
@pytest.mark.parametrize("suffix", PACK)
def test_json_lines_are_measured_as_in_the_file(tmp_path: Path, suffix: str, unit_bytes: int) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    line = json.dumps({"text": LONG})  # é takes six bytes there
    path.write_bytes(PACK[suffix](jsonl(["one"]) + line.encode() + b"\n" + jsonl(["two"])))
    assert read(path, len(line), unit_bytes) == ["one", LONG, "two"]
    assert read(path, len(line) - 1, unit_bytes) == [
        "one",
        refused(f"{path} line 2", str(len(line)), len(line) - 1),
        "two",
    ]


@pytest.mark.parametrize("suffix", PACK)
def test_files_at_and_above_it(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"a.md{suffix}"
    path.write_bytes(PACK[suffix](LONG.encode()))
    assert read(path, 60) == read(path, 61) == [LONG]
    if not suffix:  # refused by its size alone
        monkeypatch.setattr("sleeptrain.prepare.readers.unpacked", None)
    assert read(path, 59) == [refused(str(path), "60 or more" if suffix else "60", 59)]


def test_rows_at_and_above_it(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet(["one", LONG, None, "two"], path)
    assert read(path, 60)[:2] == ["one", LONG]
    assert read(path, 59)[1] == refused(f"{path} row 2", "60", 59)
    assert read(path, 59)[3] == "two"


def test_a_long_line_is_never_held(tmp_path: Path) -> None:
    """A line of 128 MiB, which is 4 kB of zstd: the reader unpacks all of its input. 100 MiB are allowed."""
    size = 128 * MIB
    (tmp_path / "a.jsonl").touch()
    os.truncate(tmp_path / "a.jsonl", size)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(bytes(size), 1))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(bytes(size)))
    program = """
import resource, sys
from pathlib import Path
import zstandard
from tests.prepare.test_longest import MIB, read

taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 100 * MIB, resource.RLIM_INFINITY))
for path in sys.argv[1:]:
    print(*read(Path(path), MIB))
"""
    paths = [str(path) for path in sorted(tmp_path.iterdir())]
    done = subprocess.run(
        [sys.executable, "-c", program, *paths], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == [refused(f"{path} line 1", f"{size:,}", MIB) for path in paths], done.stderr


def test_row_groups_are_never_held(tmp_path: Path) -> None:
    """A group of 64 MiB in pages of 1 MiB: only a few pages are in memory at a time."""
    path = tmp_path / "a.parquet"
    rows = [f"{number:02d}" * (MIB // 2) for number in range(64)]
    table = pyarrow.table({"text": rows})
    pyarrow.parquet.write_table(table, path, compression="none", use_dictionary=False, write_batch_size=1)
    program = """
import sys
from pathlib import Path
import pyarrow
from tests.prepare.test_longest import MIB, documents, slices

(part,) = slices(Path(sys.argv[1]))
print(sum(len(text) for text in documents(part, "text", MIB)), pyarrow.default_memory_pool().max_memory() // MIB)
"""
    done = subprocess.run([sys.executable, "-c", program, path], cwd=ROOT, capture_output=True, text=True, check=True)
    characters, peak = map(int, done.stdout.split())
    assert characters == 64 * MIB and 16 < peak < 60


PEAK = """
import re, sys
from tools.prepare import main

code = main(sys.argv[1:])
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_memory_stays_within_the_bound_in_the_help(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, texts: list[str], write_jsonl: Callable[..., Path]
) -> None:
    """80 bytes for each byte of the longest document (one token here), and none for longer documents."""
    (tmp_path / "t.model").write_bytes(tokenizer.files["tokenizer.model"])
    longest = 2 * MIB
    peaks = {}
    for name, length in (("short", 10), ("longest", longest - 100), ("longer", 16 * longest)):
        path = write_jsonl([*texts, "\U0001f600" + "".join(map(chr, range(35, 91))) * (length // 56)], f"{name}.jsonl")
        arguments = ["--input", path, "--out", tmp_path / name, "--tokenizer", tmp_path / "t.model", "--workers", "1"]
        arguments += ["--max-document-bytes", longest, "--validation-share", "0.3", "--on-bad-document", "skip"]
        done = subprocess.run(
            [sys.executable, "-c", PEAK, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert ("bad 1" in done.stdout) == (name == "longer")
        found = re.search(r"(\d+)\n\Z", done.stdout)
        assert found is not None
        peaks[name] = int(found[1]) * 1024
    assert peaks["short"] < 300 * MIB
    assert 20 * longest < peaks["longest"] - peaks["short"] < 80 * longest
    assert peaks["longer"] < peaks["longest"]


def test_the_longest_document_is_tokenised_in_one_piece(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, texts: list[str], write_jsonl: Callable[..., Path]
) -> None:
    long = " ".join(texts * 20)
    path = write_jsonl([*texts, long])
    longest = max(map(len, path.read_bytes().splitlines()))
    job = Job(named_inputs([str(path)]), tmp_path / "out", tokenizer, validation_share=0.3, max_document_bytes=longest)
    prepare(job)
    found = [ids.tolist() for ids in all_documents(TokenShards(job.out / side(long, 0.3)))]
    assert [tokenizer.bos_id, *tokenizer.encode(long), tokenizer.eos_id] in found
    with pytest.raises(DataError, match=rf"a\.jsonl line {len(texts) + 1}: it has .* more than --max-document-bytes"):
        prepare(replace(job, out=tmp_path / "stop", max_document_bytes=longest - 1))
    report = prepare(replace(job, out=tmp_path / "skip", max_document_bytes=longest - 1, skip_bad=True))
    assert report["bad"] == 1 and f"line {len(texts) + 1}: it has {longest:,} bytes" in report["first_bad"]
    skipped = documents_of(tmp_path / "skip", tokenizer)
    assert skipped == {name: [text for text in texts if side(text, 0.3) == name] for name in SIDES}


@pytest.fixture
def job(tmp_path: Path, tokenizer: SentencePieceTokenizer, texts: list[str], write_jsonl: Callable[..., Path]) -> Job:
    """A job whose last document is longer than the limit."""
    sources = named_inputs([str(write_jsonl([*texts, " ".join(texts)]))])
    return Job(sources, tmp_path / "made" / "out", tokenizer, 0, "text", 0.3, None, 8000, 5000, 10_000)


def test_with_a_longer_one_allowed_the_work_goes_on(job: Job) -> None:
    with pytest.raises(DataError, match="--max-document-bytes 10000"):
        prepare(job)
    units = job.out.with_name(".out.work") / "units"
    complete = {path.name for path in units.glob("0*")}
    assert len(complete) > 4
    for path in units.glob("0*/report.json"):
        assert json.loads(path.read_bytes())["max_document_bytes"] == 10_000
    raised = replace(job, max_document_bytes=10**6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sleeptrain.prepare.worker_pool.tokenise_unit", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(raised)
    assert {path.name for path in units.glob("0*")} == complete
    report = prepare(raised)
    assert report["bad"] == 0
    with pytest.raises(DataError, match="max_document_bytes 1000000, now 10000"):
        prepare(job)


@pytest.mark.parametrize(("before", "now"), [(10**6, 10_000), (10_000, 10**6)])
def test_units_of_another_limit_are_made_anew(job: Job, before: int, now: int) -> None:
    """Both calls skip documents that are too long, so a unit with one is complete either way."""
    job = replace(job, skip_bad=True)
    assert not killed(replace(job, max_document_bytes=before, out=job.out.with_name("full")), 10**6)
    assert killed(replace(job, max_document_bytes=before), 140)
    assert len(list((job.out.with_name(".out.work") / "units").glob("0*"))) > 4
    report = prepare(replace(job, max_document_bytes=now))
    expected = prepare(replace(job, max_document_bytes=now, out=job.out.with_name("anew")))
    assert report == expected
    assert report["bad"] == (now == 10_000)


def test_a_trained_tokenizer_depends_on_it(job: Job) -> None:
    trained = replace(job, tokenizer=None, vocab_size=320, skip_bad=True)
    assert killed(trained, 60)
    with pytest.raises(DataError, match=r"begun with other settings or inputs \(max_document_bytes 10000, now 20000\)"):
        prepare(replace(trained, max_document_bytes=20_000))
