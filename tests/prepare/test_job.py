from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sleeptrain import lease
from sleeptrain.data.shards import TokenShards
from sleeptrain.data.tokenizer import SentencePieceTokenizer
from sleeptrain.errors import DataError, LeaseError
from sleeptrain.lease import Lease
from sleeptrain.prepare import job as module
from sleeptrain.prepare.inputs import named_inputs
from sleeptrain.prepare.job import Job, prepare
from sleeptrain.prepare.split import SIDES, side
from sleeptrain.prepare.work import Work
from tests.data.texts import make_texts
from tests.prepare.documents import all_documents
from tests.prepare.test_readers import PACK, jsonl, parquet

SHARE = 0.3
MUTATIONS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}


def documents(out: Path, tokenizer: SentencePieceTokenizer) -> dict[str, list[str]]:
    found = {}
    for name in SIDES:
        shards = TokenShards(out / name, expect_tokenizer=tokenizer.hash)
        found[name] = [tokenizer.decode(tokens) for tokens in all_documents(shards)]
    return found


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def job(tmp_path: Path, write_jsonl: Callable[..., Path], tokenizer: SentencePieceTokenizer, texts: list[str]) -> Job:
    sources = named_inputs([str(write_jsonl(texts[:35])), str(write_jsonl(texts[35:], "b.jsonl"))])
    out = tmp_path / "made" / "out"
    return Job(sources, out, tokenizer, validation_share=SHARE, unit_bytes=5000, shard_bytes=8000)


def test_every_document_once_in_order(job: Job, tokenizer: SentencePieceTokenizer, texts: list[str]) -> None:
    report = prepare(job)
    assert documents(job.out, tokenizer) == {name: [t for t in texts if side(t, SHARE) == name] for name in SIDES}
    for name in SIDES:
        found = all_documents(TokenShards(job.out / name))
        assert {tuple(tokens[[0, -1]]) for tokens in found} == {(tokenizer.bos_id, tokenizer.eos_id)}
        assert all(tokenizer.bos_id not in tokens[1:] and tokenizer.eos_id not in tokens[:-1] for tokens in found)
    assert report["units"] > 4 and len(list((job.out / "train").glob("*.tar"))) > 4
    lengths = [[len(tokens) for tokens in all_documents(TokenShards(job.out / name))] for name in SIDES]
    assert [report[name]["tokens"] for name in SIDES] == [sum(length) for length in lengths]
    assert [report[name]["longest"] for name in SIDES] == [max(length) for length in lengths]
    num_bytes = sum(len(text.encode()) for text in texts if side(text, SHARE) == "train")
    assert report["train"]["bytes_per_token"] == round(num_bytes / sum(lengths[0]), 3)
    assert [path.name for path in job.out.parent.iterdir()] == ["out"]


def test_keys_say_unit_and_document_and_ascend(job: Job, texts: list[str]) -> None:
    prepare(job)
    found: dict[str, list[str]] = {}
    for name in SIDES:
        found[name] = []
        for shard in sorted((job.out / name).glob("*.tar")):
            with tarfile.open(shard) as tar:
                found[name] += tar.getnames()
        assert found[name] == sorted(found[name])
    keys = sorted(found["train"] + found["validation"])
    assert len(set(keys)) == len(texts)
    assert keys[0] == "000000-00000000.npy" and keys[1] == "000000-00000001.npy" and keys[-1] > "000004"


def test_every_format_gives_the_same_documents(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, texts: list[str]
) -> None:
    files: dict[str, Path] = {}
    for suffix, pack in PACK.items():
        files[f"jsonl{suffix}"] = tmp_path / f"a.jsonl{suffix}"
        files[f"jsonl{suffix}"].write_bytes(pack(jsonl(texts)))
    files["parquet"] = tmp_path / "a.parquet"
    parquet(list(texts), files["parquet"], rows=7)
    files["folder"] = tmp_path / "texts" / "*"
    files["folder"].parent.mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "texts" / f"{i:03d}.rst").write_text(text)
    found = {}
    for name, path in files.items():
        job = Job(named_inputs([str(path)]), tmp_path / name, tokenizer, validation_share=SHARE, unit_bytes=4000)
        prepare(job)
        found[name] = documents(job.out, tokenizer)
    assert found["folder"]["validation"]
    assert all(found[name] == found["folder"] for name in files)


def test_any_number_of_workers_gives_the_same_bytes(job: Job) -> None:
    prepare(job)
    expected = content(job.out)
    assert len(expected) > 20
    for workers in (2, 3):
        shutil.rmtree(job.out)
        prepare(replace(job, workers=workers))
        assert content(job.out) == expected
        assert not multiprocessing.active_children()


def test_copies_stay_on_one_side(tmp_path: Path, tokenizer: SentencePieceTokenizer, texts: list[str]) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts))
    parquet([text + "\n" for text in texts], tmp_path / "b.parquet")
    for i, text in enumerate(texts[:20]):
        (tmp_path / f"x{i}.md").write_text(text.replace("\n", "\r\n"))
    job = Job(named_inputs([f"{tmp_path}/*.*"]), tmp_path / "out", tokenizer, validation_share=SHARE)
    prepare(job)
    sides = [{" ".join(text.split()) for text in found} for found in documents(job.out, tokenizer).values()]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == {" ".join(text.split()) for text in texts}


@pytest.mark.parametrize("max_documents", [2, 7, 30, 59, 60, 1000])
def test_max_documents_are_the_first(
    job: Job, tokenizer: SentencePieceTokenizer, texts: list[str], max_documents: int
) -> None:
    share = 0.5
    prepare(replace(job, max_documents=max_documents, validation_share=share))
    expected = {name: [t for t in texts[:max_documents] if side(t, share) == name] for name in SIDES}
    assert documents(job.out, tokenizer) == expected


@pytest.fixture
def quick_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill, unlike a loss of power, loses nothing that waits for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class FileSystemKill:
    """Kills the process with SIGKILL just before the change number `at` that it makes to the file system."""

    def __init__(self, at: int, after: Path | None = None) -> None:
        self.remaining = at
        self.after = after

    def __call__(self, event: str, arguments: tuple) -> None:
        if self.after is not None:  # start to count when this path gets its name
            if event == "os.rename" and Path(os.fsdecode(arguments[1])) == self.after:
                self.after = None
        elif event in MUTATIONS or (event == "open" and isinstance(arguments[1], str) and "w" in arguments[1]):
            self.remaining -= 1
            if not self.remaining:
                os.kill(os.getpid(), 9)


def killed(job: Job, at: int, after: Path | None = None) -> bool:
    """Whether a process that does the job was killed at its change number `at`; False: it finished before."""
    child = os.fork()
    if not child:
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.addaudithook(FileSystemKill(at, after))
            prepare(job)
            status = 0
        finally:
            os._exit(status)
    status = os.waitpid(child, 0)[1]
    assert status in (0, 9)
    return status == 9


def steps(job: Job, stride: int) -> Iterator[int]:
    """Kill the job at every `stride`-th change to the file system, each time from the beginning."""
    at = 1
    while killed(job, at):
        yield at
        at += stride
    assert at > 30


def undisturbed(job: Job) -> dict[str, bytes]:
    prepare(job)
    expected = content(job.out)
    shutil.rmtree(job.out.parent)
    return expected


def check_kills(job: Job, stride: int) -> None:
    expected = undisturbed(job)
    for at in steps(job, stride):
        prepare(job)
        assert content(job.out) == expected, at
        assert [path.name for path in job.out.parent.iterdir()] == ["out"], at
        shutil.rmtree(job.out.parent)


@pytest.mark.usefixtures("quick_sync")
def test_killed_before_any_change_to_the_disk_it_goes_on(job: Job) -> None:
    check_kills(replace(job, unit_bytes=25_000, shard_bytes=20_000), stride=3)


@pytest.mark.usefixtures("quick_sync")
@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"max_documents": 40, "validation_share": 0.5}])
def test_killed_before_every_change_to_the_disk_it_goes_on(job: Job, settings: dict) -> None:
    check_kills(replace(job, **settings), stride=1)


@pytest.mark.usefixtures("quick_sync")
def test_killed_again_and_again_it_finishes(job: Job) -> None:
    expected = undisturbed(job)
    kills = 0
    while killed(job, 33):
        kills += 1
        assert kills < 100
    assert kills > 5
    assert content(job.out) == expected
    assert [path.name for path in job.out.parent.iterdir()] == ["out"]


@pytest.mark.usefixtures("quick_sync")
def test_killed_while_it_replaces_an_earlier_result(job: Job) -> None:
    job = replace(job, unit_bytes=25_000, shard_bytes=20_000, force=True)
    expected = undisturbed(job)
    at = 1
    while True:
        prepare(replace(job, validation_share=0.5))
        if not killed(job, at):
            break
        assert job.out.exists() or (job.out.with_name(".out.work") / "replaced").exists()
        prepare(job)
        assert content(job.out) == expected, at
        assert [path.name for path in job.out.parent.iterdir()] == ["out"], at
        at += 5
    assert at > 30


@pytest.mark.usefixtures("quick_sync")
def test_the_message_about_a_missing_shard_has_a_way_out(job: Job) -> None:
    job = replace(job, unit_bytes=25_000)
    expected = undisturbed(job)
    work, at = Work(job.out), 10
    while not (list(work.result.glob("*/*.tar")) and (made := list(work.units.glob("*/*/*.tar")))):
        assert killed(job, at)
        at += 3
    made[0].unlink()
    with pytest.raises(DataError, match=f"{made[0]} is gone; remove {work.path} and call again"):
        prepare(job)
    shutil.rmtree(work.path)
    prepare(job)
    assert content(job.out) == expected


@pytest.mark.usefixtures("quick_sync")
@pytest.mark.parametrize("force", [False, True])
def test_killed_when_the_target_has_its_name(job: Job, force: bool) -> None:
    job = replace(job, unit_bytes=25_000, shard_bytes=20_000, force=force)
    expected = undisturbed(job)
    at = 1
    while killed(job, at, after=job.out):
        assert content(job.out) == expected
        made = (job.out / "prepared.json").stat().st_ino
        prepare(job)
        assert content(job.out) == expected, at
        # A result is made again only by force, and only when the work folder no longer has the plan.
        assert (job.out / "prepared.json").stat().st_ino == made or (force and at > 1), at
        assert [path.name for path in job.out.parent.iterdir()] == ["out"], at
        shutil.rmtree(job.out.parent)
        at += 1
    assert at > 10


def begun(job: Job, changes: int = 60) -> Path:
    """The work folder of a job that was killed when some units were complete."""
    assert killed(job, changes)
    work = job.out.with_name(".out.work")
    assert len(list((work / "units").glob("0*"))) > 1
    return work


def test_finished_units_are_kept(job: Job) -> None:
    work = begun(job)
    complete = {path.name: path.stat().st_ino for path in (work / "units").glob("0*/report.json")}
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "sleeptrain.prepare.worker_pool.tokenise_unit", lambda task, *_: seen.append(task.unit.number) or 1 / 0
        )
        with pytest.raises(ZeroDivisionError):
            prepare(job)
    assert seen == [len(list((work / "units").glob("0*")))]
    assert {path.name: path.stat().st_ino for path in (work / "units").glob("0*/report.json")} == complete


def test_work_with_other_settings_is_refused_with_the_differences_or_forced(job: Job) -> None:
    begun(job)
    other = replace(job, validation_share=0.4)
    with pytest.raises(
        DataError, match=r"begun with other settings or inputs \(validation_share 0.3, now 0.4\).*--force"
    ):
        prepare(other)
    path = job.sources[0].path
    path.write_bytes(path.read_bytes() + b'{"text": "one more"}\n')
    changed = replace(job, sources=named_inputs([str(path), str(job.sources[1].path)]))
    with pytest.raises(DataError, match=r"input_bytes \d+, now \d+; inputs_sha256 .*; .*a\.jsonl changed"):
        prepare(changed)
    fewer = replace(job, sources=job.sources[1:])
    with pytest.raises(DataError, match=r"a\.jsonl gone"):
        prepare(fewer)
    prepare(replace(changed, force=True))
    assert [path.name for path in job.out.parent.iterdir()] == ["out"]


def test_only_one_call_at_a_time(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "GRACE", 0.0)
    work = begun(job)
    with Lease(work, "it", "wait") as other:
        other.take()
        with pytest.raises(LeaseError, match=r"out is being prepared by process .*, or name another --out"):
            prepare(job)
    prepare(job)
    assert [path.name for path in job.out.parent.iterdir()] == ["out"]


def test_a_call_that_was_taken_over_publishes_nothing(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that paused for long, while another call has begun."""

    def assembled(work: Work, *rest: Any) -> None:
        (work.path / "lease.json").write_text("of somebody else")

    monkeypatch.setattr(module, "assemble", assembled)
    with pytest.raises(LeaseError, match="taken over"):
        prepare(job)
    assert not job.out.exists()


def test_an_input_that_changes_meanwhile_is_refused(job: Job) -> None:
    path = job.sources[1].path
    path.write_bytes(b"no JSON\n" + path.read_bytes())
    with pytest.raises(DataError, match=r"b\.jsonl changed while"):
        prepare(job)


def test_bad_documents_stop_or_are_counted(job: Job, tokenizer: SentencePieceTokenizer, texts: list[str]) -> None:
    path = job.sources[1].path
    path.write_bytes(b"".join(b'{"no": 1}\n' + line for line in path.read_bytes().splitlines(keepends=True)))
    job = replace(job, sources=named_inputs([str(source.path) for source in job.sources]))
    with pytest.raises(DataError, match=r"b\.jsonl line 1: no field 'text'.*--on-bad-document skip"):
        prepare(job)
    # Complete units serve a call that treats bad documents in the other way, in both directions.
    assert len(list((job.out.with_name(".out.work") / "units").glob("0*"))) > 2
    skipping = replace(job, skip_bad=True)
    report = prepare(skipping)
    assert (report["bad"], report["empty"]) == (len(texts) - 35, 0)
    assert report["first_bad"].startswith(f"{path} line 1: ")
    assert documents(job.out, tokenizer) == {name: [t for t in texts if side(t, SHARE) == name] for name in SIDES}
    with pytest.raises(DataError, match="on_bad_document skip, now stop"):
        prepare(job)
    shutil.rmtree(job.out)
    assert killed(skipping, 100)
    with pytest.raises(DataError, match=r"b\.jsonl line 1"):
        prepare(job)


def test_empty_documents_are_counted(job: Job, write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl(["", " \n", *make_texts(20), "\t"], "c.jsonl")
    report = prepare(replace(job, sources=named_inputs([str(path)])))
    assert report["empty"] == 3 and sum(report[name]["documents"] for name in SIDES) == 20


@pytest.mark.parametrize(
    ("texts", "share", "message"),
    [
        ([], 0.3, "no document in 1 files: 0 are empty, 0 bad"),
        (["", " "], 0.3, "no document in 1 files: 2 are empty"),
        (["one"], 1e-6, "none of 1 documents is on the validation side .*: set a larger one"),
        (["one"], 1 - 1e-6, "none of 1 documents is on the train side .*: set a smaller one"),
    ],
)
def test_an_empty_side_is_refused_and_leaves_nothing(
    job: Job, write_jsonl: Callable[..., Path], texts: list[str], share: float, message: str
) -> None:
    sources = named_inputs([str(write_jsonl(texts, "c.jsonl"))])
    with pytest.raises(DataError, match=message):
        prepare(replace(job, sources=sources, validation_share=share))
    assert not job.out.parent.exists()


@pytest.mark.parametrize("name", ["shard_bytes", "unit_bytes", "workers"])
def test_senseless_settings(job: Job, name: str) -> None:
    with pytest.raises(DataError, match=f"--{name.replace('_', '-')} 0: must be at least 1"):
        replace(job, **{name: 0})


def test_no_time_is_recorded(job: Job) -> None:
    prepare(job)
    first = content(job.out)
    shutil.rmtree(job.out)
    prepare(job)
    assert content(job.out) == first
    assert json.loads(first["prepared.json"])["settings"]["inputs"] == 2
