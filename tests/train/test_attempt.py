"""The facts that an attempt records: its hosts, its job, and the code that it ran."""

from __future__ import annotations

import socket
import subprocess
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch

from sleeptrain.distributed.mesh import Mesh
from sleeptrain.distributed.world import World
from sleeptrain.train import attempt
from sleeptrain.train.attempt import Attempt, code_version, this_attempt
from tests.checkpoint.worlds import alone


def test_an_attempt_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt, "code_version", lambda: "v1")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(attempt, "recorded", lambda environment: {})
    assert this_attempt(3, alone()) == Attempt(3, [socket.gethostname()], 1, None, "v1")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert this_attempt(4, alone()).job == "77"


def test_each_host_is_named_once_in_the_order_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "gather", lambda self, value: ["b", "b", "a", "b"])
    monkeypatch.setattr(attempt, "code_version", lambda: pytest.fail("only the main process asks"))
    found = this_attempt(1, World(Mesh.single(), torch.device("cpu"), rank=1, size=4))
    assert (found.hosts, found.processes, found.code) == (["b", "a"], 4, "")


@pytest.fixture
def checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder with a .git that seems to hold the package."""
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(attempt, "__file__", str(tmp_path / "sleeptrain" / "train" / "attempt.py"))
    monkeypatch.setattr(attempt, "version", lambda name: f"{name} 9")
    return tmp_path


def test_a_checkout_is_described(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> Any:
        assert command[:4] == ["git", "-C", str(checkout), "describe"]
        return subprocess.CompletedProcess(command, 0, stdout="v1-2-gabc-dirty\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert code_version() == "v1-2-gabc-dirty"


@pytest.mark.parametrize(
    "error", [FileNotFoundError("git"), subprocess.CalledProcessError(128, "git"), subprocess.TimeoutExpired("git", 10)]
)
def test_without_an_answer_of_git_it_is_the_version_of_the_package(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def run(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(subprocess, "run", run)
    assert code_version() == "sleeptrain 9"


def test_outside_of_a_checkout_git_is_not_called(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout / ".git").rmdir()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("git was asked"))
    assert code_version() == "sleeptrain 9"

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(attempt, "version", missing)
    assert code_version() == "unknown"
