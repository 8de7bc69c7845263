"""Settings of NCCL that a run makes before NCCL starts. Variables that a user has set stay as they are.

A posted receive is a kernel that occupies its CTAs (thread blocks, each on one SM) until the message has come, and the
pipeline posts receives a task early. So messages of the pipeline get few CTAs: they have the time of a whole task, and
the kernels of the model get the SMs. Groups of tensor and data ranks keep NCCL's own numbers, since the model waits for
their sums. None of this has been measured on GPUs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path

# Two channels send 40 GB/s or more, the rate of a network adapter. Messages of a 7B (16 MB) then take 0.4 ms, and its
# rounds several ms.
PIPELINE_CTAS = 2
# Seconds after which torch ends a process whose NCCL watchdog does not answer; torch's own number.
WATCHDOG = 480
# Variables that decide how processes communicate, or how much of a machine they get. None of them holds a secret.
PREFIXES = (
    "NCCL_",
    "TORCH_NCCL_",
    "TORCH_FR_",
    "GLOO_",
    "TORCH_GLOO_",
    "FI_",
    "UCX_",
    "PYTORCH_ALLOC",
    "PYTORCH_CUDA_",
)
NAMES = ("CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


def set_defaults(environment: MutableMapping[str, str], timeout: float) -> None:
    """Set the variables that the environment does not have. NCCL reads them when it makes its first communicator.

    timeout: `health.timeout`, after which the run's own watch ends all processes and says which one is lost. torch's
    watchdog, which names none, waits longer. Failed operations end a process as torch does it by default
    (TORCH_NCCL_ASYNC_ERROR_HANDLING), in that time.
    """
    environment.setdefault("NCCL_MAX_P2P_NCHANNELS", str(PIPELINE_CTAS))
    environment.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(max(WATCHDOG, round(2 * timeout))))


@contextmanager
def communicator_settings() -> Iterator[str]:
    """The path of a file with the settings of process groups, by megatron-core's names, for the length of the block.

    megatron-core makes ProcessGroupNCCL.Options of it: `config.min_ctas`, `config.max_ctas`, which NCCL_MIN_CTAS and
    NCCL_MAX_CTAS override, and the priority of the stream, by which messages start before the kernels that wait.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "groups.yaml"
        path.write_text(f"pp: {{min_ctas: 1, max_ctas: {PIPELINE_CTAS}, is_high_priority_stream: true}}\n")
        yield str(path)


def recorded(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that an attempt records."""
    return {name: environment[name] for name in sorted(environment) if name.startswith(PREFIXES) or name in NAMES}
