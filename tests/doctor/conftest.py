"""Scripted checks, a working folder, and a fixture that finds processes left by checks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from sleeptrain.doctor.checks import CHECKS
from sleeptrain.doctor.finding import Case, Finding
from tests.doctor.cases import good, scripted


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_process_stays() -> object:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replaces all checks: scripts by name, all others good."""

    def write(limit: float = 60, **scripts: Callable[[Case], Finding]) -> None:
        for name in CHECKS:
            monkeypatch.setitem(CHECKS, name, scripted(scripts.get(name, good), limit if name in scripts else 60))

    return write
