"""What an image's pip is told: dependencies, and the base's packages that must stay."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BASE = ["nvidia-nccl-cu13==2.28.1", "numpy==2.1.0", "pytorch-triton==3.5", "torch==2.11.0a0+b34", "torchdata==0.11.0"]


def told(folder: Path, base: list[str]) -> tuple[int, str, list[str], list[str]]:
    """(exit code, stderr, requirements, constraints)"""
    (folder / "base.txt").write_text("\n".join(base) + "\n")
    names = [str(folder / name) for name in ("base.txt", "requirements.txt", "constraints.txt")]
    command = [sys.executable, ROOT / "docker/requirements.py", ROOT / "pyproject.toml", *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    written = [Path(name).read_text().splitlines() if Path(name).exists() else [] for name in names[1:]]
    return done.returncode, done.stderr, *written


def test_all_that_training_needs_is_asked_for_and_the_bases_torch_is_held(tmp_path: Path) -> None:
    code, _, requirements, constraints = told(tmp_path, BASE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert code == 0
    assert set(requirements) == {*project["dependencies"], *extras["gpu"], *extras["parallel"], *extras["data"]}
    assert constraints == ["nvidia-nccl-cu13==2.28.1", "pytorch-triton==3.5", "torch==2.11.0a0+b34"]


@pytest.mark.parametrize("base", [["numpy==2.1.0"], ["pytorch-triton==3.5", "torchdata==0.11.0"]])
def test_a_base_without_torch_is_refused(tmp_path: Path, base: list[str]) -> None:
    code, said, requirements, constraints = told(tmp_path, base)
    assert code == 1 and "BASE_IMAGE" in said and not requirements and not constraints
