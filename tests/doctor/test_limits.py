from __future__ import annotations

import os
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest

from sleeptrain.doctor import limits
from sleeptrain.doctor.finding import FAILED, OK
from tests.doctor.cases import alone

MIB = 2**20


@pytest.mark.parametrize(("free", "gpus", "state"), [(8, False, FAILED), (64, False, OK), (64, True, FAILED)])
def test_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, gpus: bool, state: str) -> None:
    status = SimpleNamespace(f_bavail=free, f_frsize=MIB, f_blocks=64)
    monkeypatch.setattr(limits, "has_driver", lambda: gpus)
    monkeypatch.setattr(os, "statvfs", lambda path: status)
    finding = limits.check_shared_memory(alone(tmp_path))
    assert finding.state == state
    assert state == OK or "--shm-size" in finding.cure


@pytest.mark.parametrize(
    ("soft", "hard", "cure"),
    [
        (256, 4096, "ulimit -n 4096"),
        (1023, resource.RLIM_INFINITY, "ulimit -n 65536"),
        (512, 512, "raise nofile in /etc/security/limits.conf"),
        (1024, 4096, ""),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, ""),
    ],
)
def test_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, cure: str) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, hard))
    finding = limits.check_open_files(alone(tmp_path))
    assert (finding.state, finding.cure) == (FAILED if cure else OK, cure)


def test_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "memory_limits", lambda: iter([]))
    monkeypatch.setattr(limits, "_available", lambda: 3 * limits.GIB)
    assert limits.check_memory(alone(tmp_path)).state == OK
    monkeypatch.setattr(limits, "_available", lambda: limits.GIB)
    finding = limits.check_memory(alone(tmp_path))
    assert finding.state == FAILED and "1.0 GiB" in finding.found and "--mem" in finding.cure


def test_a_schedulers_limit_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "memory_limits", lambda: iter([(3 * limits.GIB, 2 * limits.GIB)]))
    assert limits.check_memory(alone(tmp_path)).state == FAILED
