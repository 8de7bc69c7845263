"""Files are fetched in the background once, and a failure is only logged."""

from __future__ import annotations

import threading

import fsspec
import pytest

from sleeptrain.data.prefetch import Prefetcher
from sleeptrain.data.shards import TokenShards
from sleeptrain.data.storage import Cache, Retries
from tests.data.waiting import wait_until_idle

AT_ONCE = Retries(attempts=3, first_wait=0)


def test_two_requests_fetch_a_file_once() -> None:
    go, fetched = threading.Event(), []

    def fetch(number: int) -> None:
        go.wait(60)
        fetched.append(number)

    prefetcher = Prefetcher(fetch)
    for number in (1, 2, 3, 1, 2, 3):
        prefetcher.ask(number)
    assert sum(thread.name == "prefetch" for thread in threading.enumerate()) == 2
    go.set()
    wait_until_idle()
    assert sorted(fetched) == [1, 2, 3]
    prefetcher.ask(1)
    wait_until_idle()
    assert sorted(fetched) == [1, 1, 2, 3]


def test_failed_prefetch_is_logged(memory: str, cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    remote = TokenShards(memory, cache=cache, retries=AT_ONCE)
    fsspec.filesystem("memory").rm(f"{memory}/shard-000001.tar")
    remote.prefetch(1)
    remote.prefetch(0)
    wait_until_idle()
    assert "prefetch: memory://bucket/train/shard-000001.tar: cannot be fetched" in caplog.text
    remote.document(0, 0)
