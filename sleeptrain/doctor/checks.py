"""All checks, in the order of the output."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from sleeptrain.doctor.finding import Case, Finding

REINSTALL = "install sleeptrain again (make install)"
PARALLEL = "pip install 'sleeptrain[parallel]' in the versions that it declares"
TRANSFORMERS = "pip install 'sleeptrain[hf]' in the versions that it declares"
STORAGE = "look at the storage (mount, df, dmesg), or use another machine"


@dataclass(frozen=True)
class Check:
    """A check and its limits.

    function: `module:function` in the package sleeptrain.doctor, imported by the process that runs the check.
    limit: seconds until the check counts as hung; long, since storage may be cold and Triton may have to compile.
    cure: what to do if the check hangs, crashes or raises.
    """

    function: str
    limit: float
    cure: str

    def load(self) -> Callable[[Case], Finding]:
        module, _, name = self.function.partition(":")
        return cast(Callable[[Case], Finding], getattr(importlib.import_module(f"sleeptrain.doctor.{module}"), name))


CHECKS = {
    "python": Check("packages:check_python", 60, REINSTALL),
    "packages": Check("packages:check_packages", 60, REINSTALL),
    "optional_packages": Check("packages:check_optional_packages", 60, REINSTALL),
    "torch": Check("device:check_torch", 120, "reinstall torch for this machine and its driver"),
    "gpus": Check("device:check_gpus", 120, "leave this machine out (sbatch --exclude) and have its GPUs looked at"),
    "kernel": Check("kernel:check_kernel", 300, "reinstall torch, and with GPUs triton and flash-linear-attention"),
    "hostname": Check("network:check_hostname", 60, "repair the name service (/etc/hosts, resolv.conf)"),
    "collective": Check("ranks:check_collective", 120, "set GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME) to a working link"),
    "tensor": Check("ranks:check_tensor", 120, PARALLEL),
    "zero": Check("ranks:check_zero", 180, PARALLEL),
    "text": Check("libraries:check_text", 120, REINSTALL),
    "formats": Check("libraries:check_formats", 120, "pip install 'sleeptrain[data]' in the versions that it declares"),
    "generation": Check("libraries:check_generation", 180, TRANSFORMERS),
    "harness": Check("libraries:check_harness", 180, "pip install 'sleeptrain[eval]' in the versions that it declares"),
    "wandb": Check("libraries:check_wandb", 120, f"{REINSTALL}, or set wandb.mode=disabled"),
    "fla": Check("libraries:check_fla", 120, "pip install 'sleeptrain[gpu]' in the versions that it declares"),
    "disk": Check("storage:check_disk", 60, STORAGE),
    "space": Check("storage:check_space", 120, STORAGE),
    "shared_memory": Check("limits:check_shared_memory", 60, "mount a tmpfs on /dev/shm"),
    "open_files": Check("limits:check_open_files", 60, "raise it (ulimit -Hn 65536)"),
    "memory": Check("limits:check_memory", 60, "use a machine with more memory"),
    "data": Check("storage:check_data", 120, STORAGE),
}

# One process runs these in turn, since they use the same GPU. Then one process for each GPU runs OF_RANKS.
ON_DEVICE = ("torch", "gpus", "kernel")
# One process runs these in turn: the later ones reuse the modules that the earlier ones import.
OF_TEXT = ("text", "formats", "generation", "harness")
MEETING = "collective"  # if it fails, the other checks over several processes would only wait
OF_RANKS = (MEETING, "tensor", "zero")
CPU_RANKS = 2
