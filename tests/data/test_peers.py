"""Processes that train on the same rows get them from one reader. None waits for ever when the reader fails."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sleeptrain.config.schema import Rule110Config
from sleeptrain.data.batch import Batch, Part
from sleeptrain.data.peers import SharedReading
from sleeptrain.data.tasks.rule110 import Rule110
from sleeptrain.data.tasks.source import TaskSource
from sleeptrain.errors import DataError

CONFIG = Rule110Config(width=5, strings=2, steps=3)
RANKS, PEERS, ROWS = 4, 2, (4, 3, 6)


class Watched(TaskSource):
    """Counts its reads, and fails at read number `fails_at`."""

    def __init__(self, part: Part, fails_at: int | None) -> None:
        super().__init__(Rule110(CONFIG), 0, part)
        self.reads = 0
        self.fails_at = fails_at

    def batch(self, rows: int) -> Batch:
        if self.reads == self.fails_at:
            raise OSError("the disk is gone")
        self.reads += 1
        return super().batch(rows)


def train(rank: int, store: str, out: Path, fails_at: int | None) -> None:
    """Trains in two data-parallel groups of two peers each, and writes the batches that the rank got."""
    torch.set_num_threads(1)  # a fork of a process that has OpenMP threads may not use them
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=240)
    )
    groups = [dist.new_group(list(range(first, first + PEERS))) for first in range(0, RANKS, PEERS)]
    part = Part(rank // PEERS, RANKS // PEERS)
    source = Watched(part, fails_at)
    shared = SharedReading(source, groups[part.rank], torch.device("cpu"))
    got, error = [], ""
    try:
        got = [vars(shared.batch(rows)) for rows in ROWS]
    except (OSError, DataError) as caught:
        error = f"{type(caught).__name__}: {caught}"
    torch.save({"batches": got, "reads": source.reads, "state": source.state_dict(), "error": error}, out / f"{rank}")
    dist.destroy_process_group()


def run(tmp_path: Path, fails_at: int | None = None) -> list[dict]:
    mp.start_processes(train, (str(tmp_path / "store"), tmp_path, fails_at), nprocs=RANKS, start_method="fork")
    return [torch.load(tmp_path / str(rank)) for rank in range(RANKS)]


@pytest.mark.skipif(sys.platform == "win32", reason="gloo's file store")
def test_peers_get_what_one_of_them_reads(tmp_path: Path) -> None:
    results = run(tmp_path)
    assert [result["reads"] for result in results] == [len(ROWS), 0] * (RANKS // PEERS)
    source = TaskSource(Rule110(CONFIG), 0)
    expected = [source.batch(rows) for rows in ROWS]
    for result in results:
        assert result["state"] == source.state_dict()
    for step, batch in enumerate(expected):
        for peer in range(PEERS):
            for name, tensor in vars(batch).items():
                parts = [results[rank]["batches"][step][name] for rank in range(peer, RANKS, PEERS)]
                assert all(part.dtype == tensor.dtype for part in parts)
                assert torch.equal(torch.cat(parts), tensor), name


@pytest.mark.skipif(sys.platform == "win32", reason="gloo's file store")
def test_a_reader_that_fails_says_so_to_its_peers(tmp_path: Path) -> None:
    results = run(tmp_path, fails_at=1)
    for reader in range(0, RANKS, PEERS):
        assert results[reader]["error"] == "OSError: the disk is gone"
        assert results[reader + 1]["error"].startswith(f"PeerError: rank {reader} could not read")
