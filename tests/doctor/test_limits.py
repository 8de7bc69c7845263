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
    ("machines", "hard", "state"),
    [
        (1, 767, FAILED),
        (1, 1024, OK),
        (128, 4096, FAILED),
        (128, 65536, OK),
        (128, resource.RLIM_INFINITY, OK),
    ],
)
def test_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machines: int, hard: int, state: str) -> None:
    monkeypatch.setattr(limits, "num_gpus", lambda: 8 if machines > 1 else 1)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, hard))
    finding = limits.check_open_files(alone(tmp_path, machines=machines))
    assert finding.state == state and ("nofile" in finding.cure) is (state == FAILED)
    assert (finding.details["processes"], finding.details["needed"]) == ((1024, 4208) if machines > 1 else (1, 768))


def test_the_processes_of_a_model_replica_count_too(tmp_path: Path) -> None:
    settings = ("train.device=cpu", "parallel.pipeline=4", "parallel.tensor=2")
    assert limits.check_open_files(alone(tmp_path, *settings)).details["processes"] == 8


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
