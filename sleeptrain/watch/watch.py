"""The watch over a run: if a process is lost, stands still or fails, it ends all processes with one message.

A thread runs in each process. The main process (rank 0) checks the heartbeats of all ranks, the others check those of
rank 0. A process that detects a failure raises the alarm, which all processes poll. They end by `os._exit`, since
their main thread may wait in a collective.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator

import torch.distributed as dist

from sleeptrain.config.resolved import run_folder
from sleeptrain.config.schema import Config
from sleeptrain.distributed.world import World
from sleeptrain.errors import PeerError, UserError, exit_code
from sleeptrain.terminal import shown
from sleeptrain.watch.failure_detector import SUSPECTED, FailureDetector
from sleeptrain.watch.heartbeat import INTERVAL, Alarm, Heartbeat, where
from sleeptrain.watch.heartbeat_store import HeartbeatStore, open_store
from sleeptrain.watch.heartbeat_thread import HeartbeatThread
from sleeptrain.watch.progress import Progress
from sleeptrain.watch.stacks import python_stacks, stacks_file, write_stacks

# Seconds between two checks.
TICK = 0.5
# Seconds that a process waits for the alarm when an operation with another process has failed.
ALARM_AFTER = SUSPECTED + 7.0
# Seconds in which a process may fail and end by itself when another process has failed.
OWN_END = 3.0
# Seconds until all processes have read an alarm.
READ_AFTER = 3 * INTERVAL
# Seconds for the last messages, which a full disk or pipe may delay.
LAST_WORDS = 5.0


@contextlib.contextmanager
def watched(config: Config, world: World, ends: Callable[[Alarm], None]) -> Iterator[Progress]:
    """Watch this process while the block runs. All processes of the run enter and leave the block.

    Yields the progress, which the process must keep current. An exception raises the alarm and propagates. If the
    exception follows from the failure of another process, this process ends here with the others instead.
    ends: called with the alarm, in another thread, before the process ends.
    """
    watch = Watch(config, world, open_store(world), ends)
    watch.start()
    try:
        yield watch.progress
    except BaseException as error:
        watch.failed(error)
        raise
    finally:
        watch.close()


class Watch:
    """The watch in one process.

    store: None if the run has no other processes, or no store to reach them. ends: see `watched`.
    """

    def __init__(
        self, config: Config, world: World, store: HeartbeatStore | None, ends: Callable[[Alarm], None]
    ) -> None:
        self.progress, self._ends = Progress(), ends
        self._settings, self._rank = config.health, world.rank
        self._folder = run_folder(config)
        self._closed = threading.Event()
        self._consequence: BaseException | None = None  # error in the main thread that follows from a lost peer
        self._ended = False
        self._count = 0
        self._store_silent = 0.0
        self._heartbeats: HeartbeatThread | None = None
        if store is None:
            self._detector = FailureDetector(config.health, 1, [], sees_all=True)
        else:
            ranks = range(world.size) if world.is_main else [0]
            watched_ranks = [rank for rank in ranks if rank != world.rank]
            self._detector = FailureDetector(config.health, world.size, watched_ranks, sees_all=world.is_main)
            self._heartbeats = HeartbeatThread(store, world.rank, world.size, ranks, self._beat)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        if self._heartbeats is not None:
            self._heartbeats.start()
        self._thread.start()

    def close(self) -> None:
        """Stop the watch at the normal end of the process. The other processes will not report it as lost."""
        self._closed.set()
        self._ended = True
        if self._heartbeats is not None:
            self._heartbeats.stop()

    def failed(self, error: BaseException) -> None:
        """Raise the alarm for an error of the main thread. Does not return if the error follows from a lost process."""
        if self._heartbeats is None or self._closed.is_set():
            return
        text = f"rank {self._rank} failed at {self.progress.now}: {_error_text(error)}"
        if _is_peer_error(error):
            self._consequence = error
            self._heartbeats.hurry()
            self._closed.wait(ALARM_AFTER)  # the watch ends the process as soon as an alarm is raised
            text += "; no rank is known to be lost"
        self._closed.set()
        self._heartbeats.raise_alarm(Alarm("failed", (self._rank,), text, exit_code(error)))
        self._linger()

    def _beat(self) -> Heartbeat:
        self._count += 1
        p = self.progress
        return Heartbeat(self._count, p.moves, p.now, p.long, self._consequence is not None, self._ended)

    def _run(self) -> None:
        looked, read = time.monotonic(), 0
        while not self._closed.wait(TICK):
            now = time.monotonic()
            seconds, alarm, raised = now - looked, None, False
            if self._heartbeats is None:
                alarm, looked = self._detector.look([self._beat()], seconds), now
            elif self._heartbeats.reading.number != read:
                read, beats, alarm = self._heartbeats.reading
                alarm, raised = (alarm, False) if alarm else (self._detector.look(beats, seconds), True)
                self._store_silent, looked = 0.0, now
            else:
                alarm, raised = self._without_store(TICK), True
            if alarm is not None:
                self._alarmed(alarm, raised)

    def _without_store(self, seconds: float) -> Alarm | None:
        """An alarm if the store has not answered for too long; `seconds` have passed since the last check."""
        assert self._heartbeats is not None
        self._store_silent += seconds
        hasty = self._consequence is not None or self._heartbeats.gone
        if self._store_silent < (min(self._settings.lost_after, SUSPECTED) if hasty else self._settings.lost_after):
            return None
        last = self._detector.last(0)
        return Alarm(
            "lost",
            (0,),
            f"rank 0 or the launcher was lost, whichever holds the run's store: it has not answered for "
            f"{self._store_silent:.0f} s; rank 0 was last known {where(last)}",
        )

    def _alarmed(self, alarm: Alarm, raised: bool) -> None:
        """End this process. raised: this process detected the cause itself."""
        if raised and self._heartbeats is not None and not self._store_silent:
            first = self._heartbeats.raise_alarm(alarm)
            alarm, raised = first, first == alarm
        if alarm.kind == "failed" and self._consequence is None and self._closed.wait(OWN_END):
            return
        words = threading.Thread(target=self._last_words, args=(alarm, raised), daemon=True)
        words.start()
        words.join(LAST_WORDS)
        self._linger()
        os._exit(alarm.code)

    def _linger(self) -> None:
        """On rank 0, which may host the store, wait until the others have read the alarm."""
        if self._heartbeats is not None and self._rank == 0:
            time.sleep(READ_AFTER)

    def _last_words(self, alarm: Alarm, raised: bool) -> None:
        self._ends(alarm)
        location = self.progress.now
        lines = [f"sleeptrain: {alarm.text}"] if raised else []
        ending = f"sleeptrain: rank {self._rank} ends at {location}"
        if alarm.kind == "failed":  # the failed process prints a traceback
            _print([*lines, ending])
            return
        stacks, path = python_stacks(), stacks_file(self._folder, location, self._rank)
        if self._consequence is not None:  # the stack of the failed operation is only in the error
            stacks = "".join(traceback.format_exception(self._consequence)) + "\n" + stacks
        on_terminal = [stacks] if alarm.kind == "stalled" else []
        _print([*lines, f"{ending}; its Python stacks: {path}", *on_terminal])
        try:
            write_stacks(path, f"{alarm.text}\nrank {self._rank} is at {location}", stacks)
        except OSError as error:
            _print([f"sleeptrain: {path} could not be written ({error.strerror})", *([] if on_terminal else [stacks])])


def _print(lines: list[str]) -> None:
    """Print in one write, so that lines of several processes do not mix. On a terminal, show the cursor again."""
    lines = [shown(line) for line in lines]
    if sys.stderr.isatty():
        lines = ["\x1b[?25h", *lines]
    sys.stderr.write("\n".join(lines) + "\n")
    sys.stderr.flush()


def _error_text(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def _is_peer_error(error: BaseException) -> bool:
    """True if an operation with another process has failed. gloo and NCCL have no exception classes of their own."""
    if isinstance(error, dist.DistError | PeerError):
        return True
    return isinstance(error, RuntimeError) and any(name in str(error) for name in ("gloo", "NCCL"))
