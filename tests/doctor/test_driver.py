"""Whether a machine has NVIDIA's driver, and a run wants its GPUs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sleeptrain.doctor.driver import has_driver, wants_gpus
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
