"""Whether a machine has NVIDIA GPUs, asked without torch."""

from __future__ import annotations

import shutil
from pathlib import Path

from sleeptrain.doctor.finding import Case


def has_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def wants_gpus(case: Case) -> bool:
    """Whether the run would take GPUs where there are some."""
    return case.config is None or case.config.train.device != "cpu"
