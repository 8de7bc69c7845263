"""Does a machine have NVIDIA GPUs? Works without torch."""

from __future__ import annotations

import shutil
from pathlib import Path

from sleeptrain.doctor.finding import Case


def has_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def wants_gpus(case: Case) -> bool:
    """True if the run uses GPUs on a machine that has them."""
    return case.config is None or case.config.train.device != "cpu"
