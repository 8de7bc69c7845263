"""How a process joins the other processes of its run, by the variables of torchrun or of Slurm (srun)."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import subprocess
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from sleeptrain.config.resolved import run_folder
from sleeptrain.config.schema import Config
from sleeptrain.data.peers import SharedReading
from sleeptrain.data.source import Source
from sleeptrain.distributed import nccl
from sleeptrain.distributed.descriptors import descriptors_needed, raise_limit
from sleeptrain.distributed.meeting import MEET_WITHIN, Limit, meet, while_listening
from sleeptrain.distributed.mesh import Mesh
from sleeptrain.distributed.world import World
from sleeptrain.errors import ConfigError
from sleeptrain.stop import Stopped, StopRequest

# How long a process waits while another writes its part of a checkpoint to slow storage.
SAVING_TIMEOUT = timedelta(hours=6)
# Makes gloo connect two processes when they first communicate. By default each group connects all with all.
LAZY_GLOO = "TORCH_GLOO_LAZY_INIT"
PACKAGES = {"megatron.core": "megatron-core", "deepspeed": "deepspeed"}


@dataclass(frozen=True)
class Place:
    """A process's place among the processes that were started together.

    rank, size: its rank, and the number of processes.
    local_rank: its number on its machine.
    host, port: where the processes meet; an empty host means that MASTER_ADDR and MASTER_PORT are set.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    host: str = ""
    port: int = 0


def find_place(environment: Mapping[str, str]) -> Place:
    """This process's place, from the variables of torchrun or, in a step of srun, of Slurm; one process without them.

    Raises ConfigError for a variable that is missing or no number.
    """
    if _number(environment, "WORLD_SIZE", 1) > 1:
        names = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        if missing := [name for name in names if name not in environment]:
            raise ConfigError(
                f"WORLD_SIZE={environment['WORLD_SIZE']}, but {' and '.join(missing)} is not set: start with torchrun, "
                "which sets all of them, or unset WORLD_SIZE to train in one process"
            )
        _number(environment, "MASTER_PORT")
        rank, size, local_rank = (_number(environment, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        return Place(rank, size, local_rank)
    # Only the variables of an srun step count: a batch script is one process, however many tasks its job has.
    size = _number(environment, "SLURM_STEP_NUM_TASKS", 1)
    if size == 1:
        return Place()
    rank, local_rank = _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_LOCALID")
    if "MASTER_ADDR" in environment and "MASTER_PORT" in environment:
        _number(environment, "MASTER_PORT")
        return Place(rank, size, local_rank)
    return Place(rank, size, local_rank, _first_host(environment["SLURM_STEP_NODELIST"]), step_port(environment))


def step_port(environment: Mapping[str, str]) -> int:
    """A port for each step of each attempt of a Slurm job, below the ports that Linux uses for outgoing connections."""
    job, attempt, step = (_number(environment, f"SLURM_{name}", 0) for name in ("JOB_ID", "RESTART_COUNT", "STEP_ID"))
    return 20_000 + (64 * job + 8 * attempt + step) % 12_000


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, "" if default is None else str(default))
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name}={text} is no number: the launcher sets it; unset it, or correct it") from None


def join(config: Config, request: StopRequest | None = None) -> World:
    """Meets the other processes and returns their world. The layout must have passed `check_layout`.

    Raises ConfigError for a missing device or package, MeetingError if the processes do not meet, and Stopped if a stop
    is requested before they have met.
    """
    place = find_place(os.environ)
    device = find_device(config.train.device, place.local_rank)
    if place.size == 1:
        return World(Mesh.single(), device)
    _check_surroundings(device)
    _load_packages()
    if dist.is_initialized():
        return _make_world(config, place, device, opened=False)
    request = StopRequest() if request is None else request
    if request.requested:
        raise Stopped
    raise_limit(descriptors_needed(place.size, place.rank == 0), f"rank {place.rank} of {place.size} processes")
    _export(place)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return while_listening(lambda limit: _meet(config, place, device, limit), request)


def _meet(config: Config, place: Place, device: torch.device, limit: Limit) -> World:
    """Initialises torch.distributed, and sets the GPU again: each thread has its own current GPU."""
    timeout = config.health.timeout
    store = meet(place.rank, place.size, str(run_folder(config)), min(timeout, MEET_WITHIN), limit)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        nccl.set_defaults(os.environ, timeout)
    backend = "nccl" if device.type == "cuda" else "gloo"
    os.environ[LAZY_GLOO] = "1"
    # `device_id` is left out. With it NCCL starts at once, and all messages of a pipeline run in one stream, one after
    # the other: a receive that waits for one stage would hold up those from all others. Without it each pair of ranks
    # has a communicator and a stream of its own, for which the schedule is made (docs/pipeline.md).
    dist.init_process_group(
        backend, store=store, rank=place.rank, world_size=place.size, timeout=timedelta(seconds=timeout)
    )
    world = _make_world(config, place, device, opened=True)
    # Groups connect when they first communicate. Where a process is lost or hangs this waits, and signals are heard.
    world.sum(0)
    return world


def _make_world(config: Config, place: Place, device: torch.device, opened: bool) -> World:
    """The world of the processes of torch.distributed."""
    os.environ[LAZY_GLOO] = "1"
    timeout = timedelta(seconds=config.health.timeout)
    parallel = config.parallel
    mesh = Mesh.build(parallel.tensor, parallel.pipeline, timeout, parallel.shard_replicas)
    control = dist.new_group(backend="gloo", timeout=timeout)
    saving = dist.new_group(backend="gloo", timeout=SAVING_TIMEOUT)
    return World(mesh, device, place.rank, place.size, control, saving, opened)


def shared_reading(source: Source, world: World) -> Source | SharedReading:
    """The source of this process's batches: one of the processes that train on the same rows reads for all of them."""
    if world.model_parallel_size == 1:
        return source
    from megatron.core import parallel_state

    return SharedReading(source, parallel_state.get_model_parallel_group(), world.device)


def find_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that `train.device` names; each process on a machine has its own GPU. Raises ConfigError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device(name)
    if not torch.cuda.is_available():
        raise ConfigError("train.device=cuda, but torch sees no CUDA device; use train.device=auto or cpu")
    # A launcher may make only its own GPU visible to each process.
    count = torch.cuda.device_count()
    if count == 1:
        local_rank = 0
    if local_rank >= count:
        raise ConfigError(
            f"process {local_rank} of this machine has no GPU: it has {count}; start one process for each"
        )
    return torch.device("cuda", local_rank) if local_rank or count > 1 else torch.device("cuda")


def _load_packages() -> None:
    """Imports the packages here with their warnings silenced. Otherwise every process prints their hints later."""
    warnings.filterwarnings("ignore", "Transformer Engine and Apex are not installed")
    warnings.filterwarnings("ignore", ".*deprecated.*", FutureWarning, "torch.distributed")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it searches for one and warns
    level = logging.root.level
    logging.root.setLevel(logging.WARNING)
    try:
        for module in PACKAGES:
            importlib.import_module(module)
    finally:
        logging.root.setLevel(level)


def _check_surroundings(device: torch.device) -> None:
    if missing := [package for module, package in PACKAGES.items() if not installed(module)]:
        raise ConfigError(
            f"several processes need {' and '.join(missing)}: pip install 'sleeptrain[parallel]', or train in one"
        )
    if device.type == "cpu" and torch.cuda.is_available():
        raise ConfigError(
            "train.device=cpu with several processes does not go with visible GPUs, which megatron-core and DeepSpeed "
            "would use: set CUDA_VISIBLE_DEVICES= (nothing), or train.device=auto"
        )


def installed(module: str) -> bool:
    """True if a module can be found. It is not imported, but its parent packages are."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _export(place: Place) -> None:
    """Sets the variables that DeepSpeed reads and Slurm does not set."""
    names = {"RANK": place.rank, "WORLD_SIZE": place.size, "LOCAL_RANK": place.local_rank}
    os.environ |= {name: str(value) for name, value in names.items()}
    if place.host:
        os.environ |= {"MASTER_ADDR": place.host, "MASTER_PORT": str(place.port)}


def _first_host(nodes: str) -> str:
    """The first host of Slurm's compressed list. Raises ConfigError if scontrol does not list it."""
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise ConfigError(
            f"the first host of {nodes} is not known (scontrol: {error}); export MASTER_ADDR and MASTER_PORT"
        ) from error
