"""Leases on a folder: who has one, who gets it next, and how the one who has lost it finds out."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sleeptrain import lease as module
from sleeptrain.errors import LeaseError
from sleeptrain.holder import began, machine, read_holder
from sleeptrain.lease import Lease

GONE = "a boot and a namespace of another machine"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here waits for real seconds; what must not come to pass would take a minute."""
    for name, seconds in (("BEAT", 0.01), ("STALE", 60.0), ("GRACE", 0.0), ("LOOK", 0.005), ("BACK_AFTER", 0.1)):
        monkeypatch.setattr(module, name, seconds)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "a"


def lease(folder: Path) -> Lease:
    return Lease(folder, f"{folder} is being trained", "choose another run.name")


def left_by(folder: Path, **changed: Any) -> Path:
    """The file of a holder that nobody keeps alive, of this process but for what is changed."""
    folder.mkdir(parents=True, exist_ok=True)
    who = {"host": "elsewhere", "pid": os.getpid(), "machine": machine(), "began": began(os.getpid())}
    content = {"token": "theirs", **who, "since": 0.0, "job": None, "facts": {"attempt": 3}}
    (folder / "lease.json").write_text(json.dumps(content | changed))
    return folder / "lease.json"


@pytest.fixture
def beating() -> Iterator[list[Path]]:
    """Files that are touched all the time."""
    files, ended = list[Path](), threading.Event()

    def beat() -> None:
        count = 0
        while not ended.wait(0.005):
            count += 1
            for path in files:
                os.utime(path, (count, count))

    thread = threading.Thread(target=beat)
    thread.start()
    yield files
    ended.set()
    thread.join()


def test_it_says_who_holds_it_and_goes_with_its_holder(folder: Path) -> None:
    with lease(folder) as own:
        assert own.take("99", lambda: {"attempt": 2}) and own.is_taken and not own.is_free()
        holder = read_holder(own.path)
        assert holder is not None and (holder.pid, holder.job, holder.facts) == (os.getpid(), "99", {"attempt": 2})
        assert holder.is_local and not holder.has_ended
        own.check()
        assert [path.name for path in folder.iterdir()] == ["lease.json"]
        (folder / "records").touch()
    assert [path.name for path in folder.iterdir()] == ["records"]
    with pytest.raises(LeaseError, match="not held by this process"):
        own.check()


def test_a_folder_that_was_made_for_nothing_goes(tmp_path: Path, folder: Path) -> None:
    with lease(folder) as own:
        own.take()
        assert own.made_folder
    assert list(tmp_path.iterdir()) == []
    folder.mkdir(parents=True)
    with lease(folder) as own:
        own.take()
        assert not own.made_folder
    assert folder.is_dir()


def test_a_second_process_is_told_who_has_it_and_what_to_do(folder: Path) -> None:
    with lease(folder) as own:
        own.take("99", lambda: {"attempt": 2})
        with pytest.raises(LeaseError) as refused:
            lease(folder).take()
        own.check()
    said = str(refused.value)
    assert said.startswith(f"{folder} is being trained by process {os.getpid()} on ")
    assert "Slurm job 99, attempt 2, since 20" in said
    assert said.endswith(f"stop it (kill {os.getpid()}), or choose another run.name")


def test_one_of_many_that_start_at_once_gets_it(folder: Path) -> None:
    got, refused, start = list[Lease](), list[LeaseError](), threading.Barrier(8)

    def begin() -> None:
        own = lease(folder)
        start.wait()
        try:
            own.take()
            got.append(own)
        except LeaseError as error:
            refused.append(error)

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 7)
    got[0].check()
    assert [path.name for path in folder.iterdir()] == ["lease.json"]


@pytest.mark.skipif(not machine(), reason="looks into /proc")
def test_that_of_a_process_of_this_machine_that_is_gone_is_free_at_once(folder: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    left_by(folder, pid=process.pid, began=began(process.pid))
    own = lease(folder)
    assert not own.is_free()
    with pytest.raises(LeaseError, match=f"process {process.pid} on elsewhere"):
        own.take()
    process.kill()
    while Path(f"/proc/{process.pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z":
        time.sleep(0.005)  # its parent does not reap it
    assert own.is_free() and own.take()
    process.wait()
    own.release()
    left_by(folder, began=began(os.getpid()) - 1)  # another one has its number now
    assert own.is_free()


def test_one_of_another_machine_is_refused_as_soon_as_it_shows_life(folder: Path, beating: list[Path]) -> None:
    beating.append(left_by(folder, machine=GONE, pid=1))
    own = lease(folder)
    assert not own.is_free()
    with pytest.raises(LeaseError, match=r"process 1 on elsewhere \(attempt 3, since .*stop it there, or choose"):
        own.take()


@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b'{"token": "x"}'])
def test_one_without_a_sign_of_life_is_taken_over(
    folder: Path, content: bytes | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the clock of who waits: the file's own times are of another machine."""
    monkeypatch.setattr(module, "STALE", 0.05)
    path = left_by(folder, machine=GONE)
    if content is not None:
        path.write_bytes(content)
    os.utime(path, (2e9, 2e9))
    own = lease(folder)
    assert own.take()
    own.check()
    assert "unless that has died: watching it for up to" in capsys.readouterr().err
    own.release()


def test_an_earlier_attempt_of_the_same_job_is_waited_for(
    folder: Path, beating: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = left_by(folder, machine=GONE, job="7")
    beating.append(path)
    looks = list[int]()

    def asked() -> bool:
        looks.append(len(looks))
        if len(looks) == 20:  # it has ended
            beating.clear()
            path.unlink()
        return False

    own = lease(folder)
    assert own.take("7", stop_requested=asked) and len(looks) >= 20
    own.release()
    beating.append(left_by(folder, machine=GONE, job="7"))
    with pytest.raises(LeaseError, match="Slurm job 7"):
        lease(folder).take("8")
    monkeypatch.setattr(module, "GRACE_OF_JOB", 0.0)
    with pytest.raises(LeaseError, match="Slurm job 7"):
        lease(folder).take("7")


def test_who_is_asked_to_stop_waits_no_longer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left_by(folder)
    monkeypatch.setattr(module, "GRACE", 60.0)
    own = lease(folder)
    assert not own.take(stop_requested=lambda: True) and not own.is_taken
    assert read_holder(own.path) is not None


def test_who_has_lost_it_finds_out_and_leaves_it_to_the_other(folder: Path) -> None:
    own = lease(folder)
    own.take()
    own.check_known()
    left_by(folder, token="new")
    with pytest.raises(LeaseError, match=r"taken over by process .* on elsewhere \(attempt 3"):
        own.check()
    with pytest.raises(LeaseError):
        own.check_known()
    own.release()
    holder = read_holder(own.path)
    assert holder is not None and holder.token == "new"


def test_a_loss_comes_to_light_without_a_check(folder: Path) -> None:
    own = lease(folder)
    own.take()
    own.path.unlink()
    with pytest.raises(LeaseError, match=r"lease\.json was removed"):
        while True:
            own.check_known()
            time.sleep(0.005)


def test_a_lease_that_has_come_meanwhile_is_put_back(folder: Path) -> None:
    left_by(folder, token="newer")
    lease(folder)._take_away("older")
    holder = read_holder(folder / "lease.json")
    assert holder is not None and holder.token == "newer"
    assert [path.name for path in folder.iterdir()] == ["lease.json"]


def test_a_file_system_without_links(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with lease(folder) as own:
        own.take()
        own.check()
        with pytest.raises(LeaseError):
            lease(folder).take()
    left_by(folder, token="newer")
    lease(folder)._take_away("older")
    assert read_holder(folder / "lease.json") is not None


@pytest.mark.parametrize("place", ["a file", "a file/below", "x" * 300])
def test_a_folder_that_cannot_be_made_leaves_nothing(tmp_path: Path, place: str) -> None:
    (tmp_path / "a file").touch()
    with pytest.raises(OSError):
        lease(tmp_path / "new" / place if place.startswith("x") else tmp_path / place).take()
    assert [path.name for path in tmp_path.iterdir()] == ["a file"]
