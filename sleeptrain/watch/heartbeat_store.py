"""Where the processes of a run leave their beats: keys of the store over which they have met."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from sleeptrain.distributed.world import World
from sleeptrain.watch.heartbeat import Alarm, Heartbeat

ALARM = "alarm"
# A call of a store whose host does not answer may take longer, or never return.
CALL_TIMEOUT = timedelta(seconds=10)


class HeartbeatStore:
    """Beats of `size` ranks and one alarm, in the `run`-th run over a store.

    Every call may raise dist.DistError when the store is gone, and never return when its host hangs.
    """

    def __init__(self, store: dist.Store, size: int, run: int = 1) -> None:
        self._store = dist.PrefixStore(f"sleeptrain/watch-{run}", store)
        self._size = size

    def clear(self) -> None:
        """Makes the keys, which would be waited for; one process does so before any other uses the board."""
        for rank in range(self._size):
            self._store.set(str(rank), "")
        self._store.compare_set(ALARM, "", "")

    @property
    def is_clear(self) -> bool:
        return self._store.check([ALARM])

    def post(self, rank: int, beat: Heartbeat) -> None:
        self._store.set(str(rank), beat.encode())

    def read(self, ranks: Sequence[int]) -> tuple[list[Heartbeat | None], Alarm | None]:
        """The newest beat of each of `ranks`, and the alarm."""
        *beats, alarm = self._store.multi_get([*map(str, ranks), ALARM])
        return [Heartbeat.decode(b.decode()) if b else None for b in beats], Alarm.decode(
            alarm.decode()
        ) if alarm else None

    def raise_alarm(self, alarm: Alarm) -> Alarm:
        """Raises an alarm where there is none; returns the one that counts."""
        return Alarm.decode(self._store.compare_set(ALARM, "", alarm.encode()).decode())


def open_board(world: World) -> HeartbeatStore | None:
    """The board of a run over several processes, over a connection of its own: a call that waits blocks the others.

    None for one process, and where torch.distributed was not initialised for this run. All processes call it together.
    """
    if world.control is None or not world.opened:
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, None, False, timeout=CALL_TIMEOUT, wait_for_workers=False)
    # A launcher's store outlives a run: a restart or the next job of a sweep finds the keys of the one before.
    run = store.add("sleeptrain/watches", 1) if world.is_main else 0
    if world.is_main:
        HeartbeatStore(store, world.size, run).clear()
    return HeartbeatStore(store, world.size, world.from_first(run))
