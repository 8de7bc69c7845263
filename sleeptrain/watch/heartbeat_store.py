"""Heartbeats and the alarm of a run, as keys of the torch.distributed store through which its processes met."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from sleeptrain.distributed.world import World
from sleeptrain.watch.heartbeat import Alarm, Heartbeat

ALARM = "alarm"
# A call may take longer, or never return, if the host of the store does not answer.
CALL_TIMEOUT = timedelta(seconds=10)


class HeartbeatStore:
    """Heartbeats of `size` ranks and one alarm. run: number of the run that uses this store, from 1.

    Every call may raise dist.DistError if the store is gone, and may never return if its host hangs.
    """

    def __init__(self, store: dist.Store, size: int, run: int = 1) -> None:
        self._store = dist.PrefixStore(f"sleeptrain/watch-{run}", store)
        self._size = size

    def clear(self) -> None:
        """Make the keys, since a read of a missing key blocks. One process calls it before any other uses the keys."""
        for rank in range(self._size):
            self._store.set(str(rank), "")
        self._store.compare_set(ALARM, "", "")

    @property
    def is_clear(self) -> bool:
        return self._store.check([ALARM])

    def post(self, rank: int, beat: Heartbeat) -> None:
        self._store.set(str(rank), beat.encode())

    def read(self, ranks: Sequence[int]) -> tuple[list[Heartbeat | None], Alarm | None]:
        """(newest heartbeat of each of `ranks`, alarm); None for what is not posted."""
        *beats, alarm = self._store.multi_get([*map(str, ranks), ALARM])
        return [Heartbeat.decode(b.decode()) if b else None for b in beats], Alarm.decode(
            alarm.decode()
        ) if alarm else None

    def raise_alarm(self, alarm: Alarm) -> Alarm:
        """Raise an alarm if there is none yet. Returns the alarm that counts."""
        return Alarm.decode(self._store.compare_set(ALARM, "", alarm.encode()).decode())


def open_store(world: World) -> HeartbeatStore | None:
    """Open the heartbeat store of a run, over a new connection, since a call that waits blocks its connection.

    Returns None for a run of one process, or if torch.distributed was not initialised for this run. All processes call
    it together.
    """
    if world.control is None or not world.opened:
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, None, False, timeout=CALL_TIMEOUT, wait_for_workers=False)
    # A launcher's store outlives a run: a restart or the next job of a sweep finds the keys of the previous run.
    run = store.add("sleeptrain/watches", 1) if world.is_main else 0
    if world.is_main:
        HeartbeatStore(store, world.size, run).clear()
    return HeartbeatStore(store, world.size, world.from_first(run))
