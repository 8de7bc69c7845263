"""A process's place among those that were started together, and its device."""

from __future__ import annotations

import subprocess

import pytest
import torch
import torch.distributed as dist

from sleeptrain.config.schema import Config
from sleeptrain.distributed import launch
from sleeptrain.distributed.launch import Place, find_device, find_place, installed, step_port
from sleeptrain.errors import ConfigError
from tests.distributed.test_descriptors import open_sockets
from tests.parallel.processes import run_ranks

TORCHRUN = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "7"}
SRUN = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "node[1-2]"}


def test_the_place_of_a_process_that_torchrun_starts() -> None:
    assert find_place(TORCHRUN) == Place(3, 4, 1)
    assert find_place({**SRUN, **TORCHRUN, "WORLD_SIZE": "2", "RANK": "0"}) == Place(0, 2, 1)
    assert find_place({"WORLD_SIZE": "1", "RANK": "0"}) == Place()


def test_variables_that_a_launcher_has_not_set_are_named() -> None:
    environment = {name: value for name, value in TORCHRUN.items() if name not in ("RANK", "MASTER_PORT")}
    with pytest.raises(ConfigError, match=r"^WORLD_SIZE=4, but RANK and MASTER_PORT is not set: start with torchrun"):
        find_place(environment)


def test_the_processes_of_a_step_meet_at_its_first_host(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def scontrol(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, "node1\nnode2\n", "")

    monkeypatch.setattr(subprocess, "run", scontrol)
    assert find_place(SRUN) == Place(3, 4, 1, "node1", step_port(SRUN))
    assert commands == [["scontrol", "show", "hostnames", "node[1-2]"]]


def test_unknown_hosts_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(command: list[str], **_: object) -> None:
        raise FileNotFoundError("no scontrol")

    monkeypatch.setattr(subprocess, "run", missing)
    with pytest.raises(ConfigError, match=r"the first host of node\[1-2\] is not known .*export MASTER_ADDR"):
        find_place(SRUN)


@pytest.mark.parametrize(
    ("name", "gpus", "local_rank", "device"),
    [
        ("cpu", 2, 1, "cpu"),
        ("auto", 0, 0, "cpu"),
        ("auto", 1, 0, "cuda"),
        ("cuda", 1, 3, "cuda"),  # the launcher shows each process only its own GPU
        ("cuda", 4, 0, "cuda:0"),
        ("auto", 4, 3, "cuda:3"),
    ],
)
def test_each_process_has_a_gpu_of_its_own(
    name: str, gpus: int, local_rank: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert find_device(name, local_rank) == torch.device(device)


def test_missing_devices_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="process 2 of this machine has no GPU: it has 2"):
        find_device("cuda", 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"^train\.device=cuda, but torch sees no CUDA device"):
        find_device("cuda")


def test_packages_that_several_processes_need_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert installed("torch.distributed") and not installed("no_such_package.module")
    monkeypatch.setattr(launch, "installed", lambda module: module == "deepspeed")
    with pytest.raises(ConfigError, match=r"need megatron-core: pip install 'sleeptrain\[parallel\]'"):
        launch._check_surroundings(torch.device("cpu"))


def test_each_step_of_each_attempt_of_a_job_has_a_port_below_the_outgoing_ones() -> None:
    def port(job: int, attempt: int, step: int) -> int:
        names = {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": attempt, "SLURM_STEP_ID": step}
        return step_port({name: str(value) for name, value in names.items()})

    ports = [port(job, attempt, step) for job in (77, 78) for attempt in range(4) for step in range(3)]
    assert len(set(ports)) == len(ports)
    assert all(20_000 <= port(job, 0, 0) < 32_768 for job in range(0, 10**6, 997))


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "MASTER_PORT"])
def test_a_variable_that_is_no_number_is_named(name: str) -> None:
    right = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "host", "MASTER_PORT": "7"}
    with pytest.raises(ConfigError, match=f"{name}=x7 is no number"):
        find_place({**right, name: "x7"})


def _sockets_of_a_world() -> int:
    """The sockets that the groups of a world have open after every exchange of a run over all ranks."""
    place = Place(dist.get_rank(), dist.get_world_size())
    before = open_sockets()
    world = launch._make_world(Config(), place, torch.device("cpu"), opened=False)
    assert world.control is not None and world.saving is not None
    for group in (world.control, world.saving):
        dist.barrier(group=group)
        world.all_or_raise(lambda: None, group)
    world.sum(1.0)
    world.from_last("end")
    return open_sockets() - before


def test_a_rank_connects_to_few_others(imported: None) -> None:
    eight, sixteen = (run_ranks(_sockets_of_a_world, size) for size in (8, 16))
    assert max(sixteen) - max(eight) <= 6, "groups that connect all ranks with all have 64 more"
