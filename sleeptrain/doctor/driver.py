"""Does a machine have NVIDIA GPUs? Works without torch."""

from __future__ import annotations

import shutil
from pathlib import Path

from sleeptrain.doctor.finding import Case

# GPUs of most nodes.
GPUS = 8


def has_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def num_gpus() -> int:
    """The number of NVIDIA GPUs that the driver lists, 1 without a driver; where it has no list, that of most nodes."""
    if not has_driver():
        return 1
    listed = Path("/proc/driver/nvidia/gpus")
    return len(list(listed.iterdir())) if listed.is_dir() else GPUS


def wants_gpus(case: Case) -> bool:
    """True if the run uses GPUs on a machine that has them."""
    return case.config is None or case.config.train.device != "cpu"
