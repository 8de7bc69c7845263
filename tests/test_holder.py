"""The holder of a lease, from its file, and whether that process lives."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from sleeptrain import holder as module
from sleeptrain.holder import Holder, began, last_sign, machine, read_holder

SELF = Holder("mine", "node1", os.getpid(), machine(), began(os.getpid()), 0.0, "7", {"attempt": 3})
reads_proc = pytest.mark.skipif(not machine(), reason="looks into /proc")


def test_a_holder_is_described_in_words() -> None:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(0.0))
    assert str(SELF) == f"process {os.getpid()} on node1 (Slurm job 7, attempt 3, since {since})"
    assert str(replace(SELF, job=None, facts={})) == f"process {os.getpid()} on node1 (since {since})"


def test_a_holder_is_read_back_unchanged(tmp_path: Path) -> None:
    assert read_holder(tmp_path / "lease.json") is None
    (tmp_path / "lease.json").write_text(json.dumps(asdict(SELF)))
    assert read_holder(tmp_path / "lease.json") == SELF


@pytest.mark.parametrize(
    "change", [{"pid": -1}, {"pid": 2**31}, {"began": 0.5}, {"job": 7}, {"facts": []}, {"more": 1}, {"since": "now"}]
)
def test_a_damaged_file_is_an_unknown_holder(tmp_path: Path, change: dict[str, object]) -> None:
    content = json.dumps(asdict(SELF) | change).encode()
    (tmp_path / "lease.json").write_bytes(content)
    found = read_holder(tmp_path / "lease.json")
    assert found is not None and (found.host, found.token) == ("an unknown host", content.hex())
    assert not found.is_local and not found.has_ended


@reads_proc
def test_this_process_lives_and_an_earlier_one_of_its_number_has_ended() -> None:
    assert SELF.is_local and not SELF.has_ended
    assert replace(SELF, began=SELF.began - 1).has_ended


@reads_proc
def test_a_process_that_does_not_exist_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_stat", lambda pid: Path("/proc/none/stat").read_bytes())
    ended = replace(SELF, pid=2**31 - 1)
    assert ended.has_ended

    def not_ours(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", not_ours)
    assert not ended.has_ended, "of another user, whom /proc does not show"


def test_processes_of_another_machine_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(SELF, machine="another boot", pid=2**31 - 1)
    assert not other.is_local and not other.has_ended
    monkeypatch.setattr(module, "machine", lambda: "")
    assert not replace(SELF, machine="").is_local, "two that know nothing of themselves"


@reads_proc
def test_the_start_of_a_process_is_known_while_it_exists() -> None:
    assert began(os.getpid()) > 0 == began(2**31 - 1)


def test_the_last_sign_of_life_is_the_time_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    path.touch()
    os.utime(path, ns=(1, 123_000_000_000))
    assert last_sign(path) == 123_000_000_000
