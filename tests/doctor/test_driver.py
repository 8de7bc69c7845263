"""Whether a machine has NVIDIA's driver, and a run wants its GPUs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sleeptrain.doctor import driver
from sleeptrain.doctor.driver import has_driver, num_gpus, wants_gpus
from tests.doctor.cases import alone


@pytest.mark.parametrize(
    ("loaded", "program", "expected"),
    [(False, None, False), (True, None, True), (False, "/usr/bin/nvidia-smi", True)],
)
def test_a_driver_is_known_by_itself_or_by_its_program(
    monkeypatch: pytest.MonkeyPatch, loaded: bool, program: str | None, expected: bool
) -> None:
    monkeypatch.setattr(Path, "exists", lambda path: loaded and str(path) == "/proc/driver/nvidia/version")
    monkeypatch.setattr(shutil, "which", lambda name: program if name == "nvidia-smi" else None)
    assert has_driver() is expected


def test_only_a_run_on_the_cpu_wants_none(tmp_path: Path) -> None:
    assert wants_gpus(alone(tmp_path)), "no run: all that the machine has"
    assert wants_gpus(alone(tmp_path, "train.device=auto")) and wants_gpus(alone(tmp_path, "train.device=cuda"))
    assert not wants_gpus(alone(tmp_path, "train.device=cpu"))


def test_gpus_are_those_that_the_driver_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "has_driver", lambda: True)
    monkeypatch.setattr(Path, "is_dir", lambda path: str(path) == "/proc/driver/nvidia/gpus")
    monkeypatch.setattr(Path, "iterdir", lambda path: iter([path / "0000:01:00.0", path / "0000:02:00.0"]))
    assert num_gpus() == 2
    monkeypatch.setattr(driver, "has_driver", lambda: False)
    assert num_gpus() == 1
