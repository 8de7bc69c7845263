"""Leases on a folder: the holder, the next holder, and the discovery of a lost lease."""

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
    """No test waits for seconds. Times that must not pass are a minute."""
    for name, seconds in (("BEAT", 0.01), ("STALE", 60.0), ("GRACE", 0.0), ("LOOK", 0.005), ("BACK_AFTER", 0.1)):
        monkeypatch.setattr(module, name, seconds)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "a"


def lease(folder: Path) -> Lease:
    return Lease(folder, f"{folder} is being trained", "choose another run.name")


def write_lease(folder: Path, **changed: Any) -> Path:
    """Writes the lease of a holder without a heartbeat: this process, apart from the changed fields."""
    folder.mkdir(parents=True, exist_ok=True)
    who = {"host": "elsewhere", "pid": os.getpid(), "machine": machine(), "began": began(os.getpid())}
    content = {"token": "theirs", **who, "since": 0.0, "job": None, "facts": {"attempt": 3}}
    (folder / "lease.json").write_text(json.dumps(content | changed))
    return folder / "lease.json"


@pytest.fixture
def beating() -> Iterator[list[Path]]:
    """Files whose times a thread changes all the time."""
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


def test_a_lease_names_its_holder_and_is_removed_at_its_end(folder: Path) -> None:
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


def test_a_folder_that_stays_empty_is_removed(tmp_path: Path, folder: Path) -> None:
    with lease(folder) as own:
        own.take()
        assert own.made_folder
    assert list(tmp_path.iterdir()) == []
    folder.mkdir(parents=True)
    with lease(folder) as own:
        own.take()
        assert not own.made_folder
    assert folder.is_dir()


def test_a_second_process_learns_the_holder_and_the_way_out(folder: Path) -> None:
    with lease(folder) as own:
        own.take("99", lambda: {"attempt": 2})
        with pytest.raises(LeaseError) as refused:
            lease(folder).take()
        own.check()
    message = str(refused.value)
    assert message.startswith(f"{folder} is being trained by process {os.getpid()} on ")
    assert "Slurm job 99, attempt 2, since 20" in message
    assert message.endswith(f"stop it (kill {os.getpid()}), or choose another run.name")


def test_one_of_many_processes_that_start_at_once_gets_the_lease(folder: Path) -> None:
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
def test_the_lease_of_an_ended_process_of_this_machine_is_free_at_once(folder: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    write_lease(folder, pid=process.pid, began=began(process.pid))
    own = lease(folder)
    assert not own.is_free()
    with pytest.raises(LeaseError, match=f"process {process.pid} on elsewhere"):
        own.take()
    process.kill()
    while Path(f"/proc/{process.pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z":
        time.sleep(0.005)  # its parent has not reaped it
    assert own.is_free() and own.take()
    process.wait()
    own.release()
    write_lease(folder, began=began(os.getpid()) - 1)  # another process has the number now
    assert own.is_free()


def test_a_lease_of_another_machine_is_refused_as_soon_as_it_shows_life(folder: Path, beating: list[Path]) -> None:
    beating.append(write_lease(folder, machine=GONE, pid=1))
    own = lease(folder)
    assert not own.is_free()
    with pytest.raises(LeaseError, match=r"process 1 on elsewhere \(attempt 3, since .*stop it there, or choose"):
        own.take()


@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b'{"token": "x"}'])
def test_a_lease_without_a_sign_of_life_is_taken_over(
    folder: Path, content: bytes | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The clock of the waiting process counts: the file's times come from another machine."""
    monkeypatch.setattr(module, "STALE", 0.05)
    path = write_lease(folder, machine=GONE)
    if content is not None:
        path.write_bytes(content)
    os.utime(path, (2e9, 2e9))
    own = lease(folder)
    assert own.take()
    own.check()
    assert "unless that has died: watching it for up to" in capsys.readouterr().err
    own.release()


def test_a_job_waits_for_its_earlier_attempt(
    folder: Path, beating: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lease(folder, machine=GONE, job="7")
    beating.append(path)
    looks = list[int]()

    def stop_requested() -> bool:
        looks.append(len(looks))
        if len(looks) == 20:  # the attempt has ended
            beating.clear()
            path.unlink()
        return False

    own = lease(folder)
    assert own.take("7", stop_requested=stop_requested) and len(looks) >= 20
    own.release()
    beating.append(write_lease(folder, machine=GONE, job="7"))
    with pytest.raises(LeaseError, match="Slurm job 7"):
        lease(folder).take("8")
    monkeypatch.setattr(module, "GRACE_OF_JOB", 0.0)
    with pytest.raises(LeaseError, match="Slurm job 7"):
        lease(folder).take("7")


def test_a_request_to_stop_ends_the_wait(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lease(folder)
    monkeypatch.setattr(module, "GRACE", 60.0)
    own = lease(folder)
    assert not own.take(stop_requested=lambda: True) and not own.is_taken
    assert read_holder(own.path) is not None


def test_a_process_that_has_lost_its_lease_raises_and_does_not_remove_the_new_one(folder: Path) -> None:
    own = lease(folder)
    own.take()
    own.check_known()
    write_lease(folder, token="new")
    with pytest.raises(LeaseError, match=r"taken over by process .* on elsewhere \(attempt 3"):
        own.check()
    with pytest.raises(LeaseError):
        own.check_known()
    own.release()
    holder = read_holder(own.path)
    assert holder is not None and holder.token == "new"


def test_a_loss_is_found_without_a_check(folder: Path) -> None:
    own = lease(folder)
    own.take()
    own.path.unlink()
    with pytest.raises(LeaseError, match=r"lease\.json was removed"):
        while True:
            own.check_known()
            time.sleep(0.005)


def test_a_newer_lease_is_put_back(folder: Path) -> None:
    write_lease(folder, token="newer")
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
    write_lease(folder, token="newer")
    lease(folder)._take_away("older")
    assert read_holder(folder / "lease.json") is not None


@pytest.mark.parametrize("place", ["a file", "a file/below", "x" * 300])
def test_a_folder_that_cannot_be_made_leaves_nothing(tmp_path: Path, place: str) -> None:
    (tmp_path / "a file").touch()
    with pytest.raises(OSError):
        lease(tmp_path / "new" / place if place.startswith("x") else tmp_path / place).take()
    assert [path.name for path in tmp_path.iterdir()] == ["a file"]
