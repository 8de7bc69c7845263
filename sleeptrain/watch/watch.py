"""The watch over a run: ends every process, with one message, when one of them is lost, stands still or fails.

A thread in each process. The process that leads looks at all beats, the others at its; whoever finds something raises
the alarm, which all processes poll. They end by `os._exit`, also where their main thread waits in a collective.
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
from sleeptrain.watch.heartbeat_store import HeartbeatStore, open_board
from sleeptrain.watch.heartbeat_thread import Exchange
from sleeptrain.watch.progress import Progress
from sleeptrain.watch.stacks import python_stacks, stacks_file, write_stacks

# Seconds between two looks.
TICK = 0.5
# Seconds that a process whose peer has gone waits to be told which.
TOLD_AFTER = SUSPECTED + 7.0
# Seconds in which a process may fail by itself, and end in good order, when another one has failed.
OWN_END = 3.0
# Seconds until all have read an alarm.
READ_AFTER = 3 * INTERVAL
# Seconds for the last words, which a full disk or pipe may hold up.
LAST_WORDS = 5.0


@contextlib.contextmanager
def watched(config: Config, world: World, ends: Callable[[Alarm], None]) -> Iterator[Progress]:
    """Watches the process, which keeps its progress current; all processes of the run enter and leave it.

    An exception raises the alarm before it goes on, unless it only follows from another process's failure: then this
    process ends here with the others. ends: called, from another thread, before the process ends at an alarm.
    """
    watch = Watch(config, world, open_board(world), ends)
    watch.start()
    try:
        yield watch.progress
    except BaseException as error:
        watch.failed(error)
        raise
    finally:
        watch.close()


class Watch:
    """One process's part of the watch. board: None where there are no other processes, or none to speak with.

    ends: see `watched`.
    """

    def __init__(
        self, config: Config, world: World, board: HeartbeatStore | None, ends: Callable[[Alarm], None]
    ) -> None:
        self.progress, self._ends = Progress(), ends
        self._settings, self._rank = config.health, world.rank
        self._folder = run_folder(config)
        self._closed = threading.Event()
        self._consequence: BaseException | None = None  # what failed in the main thread since a peer is gone
        self._ended = False
        self._count = 0
        self._store_silent = 0.0
        self._exchange: Exchange | None = None
        if board is None:
            self._judge = FailureDetector(config.health, 1, [], sees_all=True)
        else:
            ranks = range(world.size) if world.is_main else [0]
            judged = [rank for rank in ranks if rank != world.rank]
            self._judge = FailureDetector(config.health, world.size, judged, sees_all=world.is_main)
            self._exchange = Exchange(board, world.rank, world.size, ranks, self._beat)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        if self._exchange is not None:
            self._exchange.start()
        self._thread.start()

    def close(self) -> None:
        """The process ends in good order: it is neither watched any longer nor missed by the others."""
        self._closed.set()
        self._ended = True
        if self._exchange is not None:
            self._exchange.stop()

    def failed(self, error: BaseException) -> None:
        """The main thread has failed. Does not return where that follows from the loss of another process."""
        if self._exchange is None or self._closed.is_set():
            return
        text = f"rank {self._rank} failed at {self.progress.now}: {_said(error)}"
        if _is_of_a_peer(error):
            self._consequence = error
            self._exchange.hurry()
            self._closed.wait(TOLD_AFTER)  # the watch ends the process as soon as it knows of whom to tell
            text += "; no rank is known to be lost"
        self._closed.set()
        self._exchange.raise_alarm(Alarm("failed", (self._rank,), text, exit_code(error)))
        self._linger()

    def _beat(self) -> Heartbeat:
        self._count += 1
        here = self.progress
        return Heartbeat(self._count, here.moves, here.now, here.long, self._consequence is not None, self._ended)

    def _run(self) -> None:
        looked, read = time.monotonic(), 0
        while not self._closed.wait(TICK):
            now = time.monotonic()
            seconds, alarm, raised = now - looked, None, False
            if self._exchange is None:
                alarm, looked = self._judge.look([self._beat()], seconds), now
            elif self._exchange.seen.readings != read:
                read, beats, alarm = self._exchange.seen
                alarm, raised = (alarm, False) if alarm else (self._judge.look(beats, seconds), True)
                self._store_silent, looked = 0.0, now
            else:
                alarm, raised = self._without_store(TICK), True
            if alarm is not None:
                self._alarmed(alarm, raised)

    def _without_store(self, seconds: float) -> Alarm | None:
        """Nothing new has been read: is the store lost, and whoever holds it?"""
        assert self._exchange is not None
        self._store_silent += seconds
        hasty = self._consequence is not None or self._exchange.gone
        if self._store_silent < (min(self._settings.lost_after, SUSPECTED) if hasty else self._settings.lost_after):
            return None
        last = self._judge.last(0)
        return Alarm(
            "lost",
            (0,),
            f"rank 0 or the launcher was lost, whichever holds the run's store: it has not answered for "
            f"{self._store_silent:.0f} s; rank 0 was last known {where(last)}",
        )

    def _alarmed(self, alarm: Alarm, raised: bool) -> None:
        """The end of this process; raised: it has found the cause itself."""
        if raised and self._exchange is not None and not self._store_silent:
            counted = self._exchange.raise_alarm(alarm)
            alarm, raised = counted, counted == alarm
        if alarm.kind == "failed" and self._consequence is None and self._closed.wait(OWN_END):
            return
        words = threading.Thread(target=self._last_words, args=(alarm, raised), daemon=True)
        words.start()
        words.join(LAST_WORDS)
        self._linger()
        os._exit(alarm.code)

    def _linger(self) -> None:
        """Rank 0, which may hold the store, stays until the others have read the alarm."""
        if self._exchange is not None and self._rank == 0:
            time.sleep(READ_AFTER)

    def _last_words(self, alarm: Alarm, raised: bool) -> None:
        self._ends(alarm)
        here = self.progress.now
        lines = [f"sleeptrain: {alarm.text}"] if raised else []
        own = f"sleeptrain: rank {self._rank} ends at {here}"
        if alarm.kind == "failed":  # what failed has a traceback of its own
            _print([*lines, own])
            return
        stacks, path = python_stacks(), stacks_file(self._folder, here, self._rank)
        if self._consequence is not None:  # the main thread has come out of where it was
            stacks = "".join(traceback.format_exception(self._consequence)) + "\n" + stacks
        shown = [stacks] if alarm.kind == "stalled" else []
        _print([*lines, f"{own}; its Python stacks: {path}", *shown])
        try:
            write_stacks(path, f"{alarm.text}\nrank {self._rank} is at {here}", stacks)
        except OSError as error:
            _print([f"sleeptrain: {path} could not be written ({error.strerror})", *([] if shown else [stacks])])


def _print(lines: list[str]) -> None:
    """In one write, so that the words of several processes do not mix; on a terminal with the cursor shown again."""
    lines = [shown(line) for line in lines]
    if sys.stderr.isatty():
        lines = ["\x1b[?25h", *lines]
    sys.stderr.write("\n".join(lines) + "\n")
    sys.stderr.flush()


def _said(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def _is_of_a_peer(error: BaseException) -> bool:
    """Whether an operation with another process has failed. gloo and NCCL have no exceptions of their own."""
    if isinstance(error, dist.DistError | PeerError):
        return True
    return isinstance(error, RuntimeError) and any(name in str(error) for name in ("gloo", "NCCL"))
