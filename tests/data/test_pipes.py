"""Files that a command writes: the command ends when its reader ends, and not before."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sleeptrain.data.pipes import STDERR_SHOWN, open_pipe
from sleeptrain.data.shards import TokenShards
from sleeptrain.data.storage import Cache
from tests.data.waiting import wait_for


def test_the_output_of_a_command_is_read() -> None:
    with open_pipe("pipe:printf one; printf two") as stream:
        assert stream.read() == b"onetwo"


def test_the_error_of_a_command_shows_the_end_of_its_output() -> None:
    with (
        pytest.raises(OSError, match=r"^exit status 3: no such  ?bucket$"),
        open_pipe("pipe:echo 'no such\nbucket' >&2; exit 3") as stream,
    ):
        stream.read()
    with (
        pytest.raises(OSError, match=r"^exit status 1: x+end$") as refusal,
        open_pipe("pipe:printf '%0600d' 0 | tr 0 x >&2; echo end >&2; exit 1"),
    ):
        pass
    assert len(str(refusal.value)) == len("exit status 1: ") + STDERR_SHOWN


def alive(marker: str) -> bool:
    """Whether a command with `marker` in it runs."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if marker.encode() in path.read_bytes():
                return True
    return False


def test_abandoned_command_is_ended(tmp_path: Path) -> None:
    marker = f"98.{os.getpid()}"
    with pytest.raises(KeyboardInterrupt), open_pipe(f"pipe:echo x; sleep {marker}; echo") as stream:
        assert stream.read(1) == b"x"
        assert alive(marker)
        raise KeyboardInterrupt
    wait_for(lambda: not alive(marker))


READER = """
import atexit, signal, sys, time
atexit.register(time.sleep, 0.3)  # the last thing done: time for a thread to complain
from sleeptrain.data.shards import TokenShards
from sleeptrain.data.storage import Cache

caught = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: caught.append(number))
shards = TokenShards(sys.argv[1], cache=Cache(sys.argv[2]))
if sys.argv[3] == "read":
    print(len(shards.document(0, 0)), len(caught), flush=True)
else:
    shards.prefetch(0)
    input()
"""


def reader(location: str, cache: Cache, mode: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", READER, location, str(cache.path), mode]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def test_signals_to_the_group_do_not_end_a_download(
    shards: TokenShards, folder: Path, cache: Cache, tmp_path: Path
) -> None:
    started, go = tmp_path / "started", tmp_path / "go"
    name = f"{folder}/shard-{{000000..000000}}.tar"
    slow = f"f={name}; case $f in *.tar) touch {started}; until [ -e {go} ]; do sleep 0.05; done;; esac; cat $f"
    process = reader(f"pipe:{slow}", cache, "read")
    try:
        wait_for(started.exists)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.killpg(process.pid, number)
            time.sleep(0.1)  # so that the next signal is a second one
        go.touch()
        output, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    assert output.split() == [str(len(shards.document(0, 0))), "3"]


def test_a_download_ahead_ends_with_the_process(folder: Path, cache: Cache, tmp_path: Path) -> None:
    started, marker = tmp_path / "started", f"97.{os.getpid()}"
    name = f"{folder}/shard-{{000000..000000}}.tar"
    endless = f"pipe:f={name}; case $f in *.tar) touch {started}; sleep {marker}; echo;; esac; cat $f"
    process = reader(endless, cache, "prefetch")
    try:
        wait_for(started.exists)
        _, complaints = process.communicate("\n", timeout=240)
    finally:
        process.kill()
    wait_for(lambda: not alive(marker))
    assert (process.returncode, complaints) == (0, "")
