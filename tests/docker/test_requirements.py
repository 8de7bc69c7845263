"""The requirements and constraints of pip in an image: dependencies, and packages of the base that must stay."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.locks import lock_lines

ROOT = Path(__file__).resolve().parents[2]
TORCH = "torch==2.13.0a0+9186a08b2c.nv26.07"
BASE = ["nvidia-nccl-cu13==2.28.1", "numpy==2.1.0", "triton==3.7.1+gitf797708c.nv26.7", TORCH, "torchdata==0.11.0"]
HELD = [BASE[0], BASE[2], BASE[3]]


def resolve(folder: Path, base: list[str], *constrained: str) -> tuple[int, str, list[str], list[str]]:
    """(exit code, stderr, requirements, constraints). constrained: the lines of the base's own constraints."""
    (folder / "base.txt").write_text("\n".join(base) + "\n")
    (folder / "own.txt").write_text("\n".join(constrained) + "\n")
    names = [str(folder / name) for name in ("base.txt", "requirements.txt", "constraints.txt")]
    inputs = [ROOT / "pyproject.toml", ROOT / "requirements/gpu.txt"]
    command = [sys.executable, ROOT / "docker/requirements.py", *inputs, *names]
    environment = os.environ | {"PIP_CONSTRAINT": str(folder / "own.txt")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    written = [Path(name).read_text().splitlines() if Path(name).exists() else [] for name in names[1:]]
    return done.returncode, done.stderr, *written


def test_training_gets_the_versions_of_the_lock_and_the_torch_of_the_base(tmp_path: Path) -> None:
    code, _, requirements, constraints = resolve(tmp_path, BASE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    own = {*project["project"]["dependencies"], *project["build-system"]["requires"]}
    assert code == 0
    assert set(requirements) == {*own, *extras["gpu"], *extras["parallel"], *extras["data"]}
    assert set(HELD) <= set(constraints)
    pinned = {Requirement(line).name: line for line in constraints}
    assert len(pinned) == len(constraints)  # no package stands twice
    locked = {Requirement(line).name: line for line in lock_lines(ROOT / "requirements/gpu.txt")}
    assert {name for name, line in pinned.items() if line != locked.get(name)} == {Requirement(h).name for h in HELD}
    assert pinned["numpy"] == locked["numpy"] and {"hatchling", "setuptools", "wheel"} <= set(pinned)


def test_constraints_of_the_base_are_not_repeated(tmp_path: Path) -> None:
    _, _, _, constraints = resolve(tmp_path, BASE, "# made with the image", "NumPy==2.1.0", "pip_tools==7")
    assert not any(line.startswith("numpy") for line in constraints)
    assert any(line.startswith("safetensors==") for line in constraints)


def test_triton_keeps_the_name_of_its_vendor(tmp_path: Path) -> None:
    """PyPI's triton would overwrite the same module."""
    _, _, requirements, constraints = resolve(tmp_path, [TORCH, "pytorch-triton==3.7.1+git1"])
    assert any(line.startswith("pytorch-triton>=3.7.1") for line in requirements)
    assert not any(line.startswith("triton") for line in [*requirements, *constraints])


@pytest.mark.parametrize("base", [["numpy==2.1.0"], ["pytorch-triton==3.5", "torchdata==0.11.0"]])
def test_a_base_without_torch_is_refused(tmp_path: Path, base: list[str]) -> None:
    code, message, requirements, constraints = resolve(tmp_path, base)
    assert code == 1 and "BASE_IMAGE" in message and not requirements and not constraints
