"""The descriptors of a process, counted and allowed."""

from __future__ import annotations

import os
import resource
from itertools import pairwise

import pytest

from sleeptrain.distributed.descriptors import allowed, descriptors_needed, raise_limit
from sleeptrain.errors import ConfigError

UNLIMITED = resource.RLIM_INFINITY


def open_sockets() -> int:
    """The sockets that this process has open."""
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return sum(os.readlink(link).startswith("socket:") for link in links if os.path.lexists(link))


def test_only_where_one_rank_gathers_from_all_the_number_grows_with_the_ranks() -> None:
    needed = [descriptors_needed(size) for size in (1, 2, 8, 64, 1024, 4096)]
    assert all(a < b for a, b in pairwise(needed))
    assert descriptors_needed(4096) < 4 * 4096 and descriptors_needed(4096, main=False) < 2 * 4096
    assert descriptors_needed(2) < 1024, "the limit that most systems set holds for a few processes"
    assert descriptors_needed(1024) > 4 * 1024 - 1024, "1,024 processes are beyond it"


@pytest.mark.parametrize(
    ("limits", "needed", "after"),
    [
        ((1024, 4096), 1000, None),
        ((1024, 4096), 4096, (4096, 4096)),
        ((1024, UNLIMITED), 5000, (UNLIMITED, UNLIMITED)),
        ((UNLIMITED, UNLIMITED), 5000, None),
    ],
)
def test_the_limit_is_raised_where_more_is_needed(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], needed: int, after: tuple[int, int] | None
) -> None:
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda which, pair: calls.append(pair))
    raise_limit(needed, "this run")
    assert calls == ([] if after is None else [after])


def test_a_hard_limit_that_is_too_low_is_refused_with_the_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 4096))
    with pytest.raises(ConfigError, match=r"^rank 0 needs 4208 open files, and the hard limit is 4096 .*nofile"):
        raise_limit(4208, "rank 0")
    assert allowed(4096) and not allowed(4097)
