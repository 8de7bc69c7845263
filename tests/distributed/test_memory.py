from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sleeptrain.distributed import memory
from sleeptrain.distributed.mesh import Mesh
from sleeptrain.distributed.world import World

GIB = 2**30


@pytest.fixture(params=[1, 2])
def grouped(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job with a limit of 3 GiB, of which it uses 2, two groups above the process's own group, which has none.

    param: the version of cgroups.
    """
    kinds, names = ("memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"))
    if request.param == 2:
        kinds, names = "", ("memory.max", "memory.current")
    job = tmp_path / kinds / "slurm/job_7"
    (job / "step_0/task_0").mkdir(parents=True)
    for name, amount in zip(names, (3 * GIB, 2 * GIB), strict=True):
        (job / name).write_text(f"{amount}\n")
    (job / "step_0" / names[0]).write_text("max\n")
    (job / "step_0" / names[1]).write_text("0\n")
    own = tmp_path / "cgroup"
    own.write_text(f"7:cpu:/elsewhere\n0:{kinds}:/slurm/job_7/step_0/task_0\n")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN_GROUPS", own)


@pytest.mark.usefixtures("grouped")
def test_a_schedulers_limit_is_the_memory_of_a_process() -> None:
    assert list(memory.memory_limits()) == [(3 * GIB, 2 * GIB)]
    assert memory.device_memory(torch.device("cpu")) == 3 * GIB


def test_without_a_limit_it_is_the_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "none")
    monkeypatch.setattr(memory.os, "sysconf", {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert memory.device_memory(torch.device("cpu")) == 4_096_000


@pytest.mark.parametrize(
    ("device", "found", "least"),
    [
        ("cpu", [("a", 8 * GIB), ("a", 8 * GIB), ("b", 6 * GIB)], 4 * GIB),
        ("cpu", [("a", 8 * GIB), ("a", 8 * GIB), ("b", 3 * GIB)], 3 * GIB),
        ("cuda", [("GPU of rank 0", 80 * GIB), ("GPU of rank 1", 79 * GIB)], 79 * GIB),
    ],
)
def test_the_process_with_the_least_decides(
    device: str, found: list[tuple[str, int]], least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes on the CPUs of one machine share its memory."""
    monkeypatch.setattr(memory, "device_memory", lambda _: found[0][1])
    sent: list[Any] = []

    def gather(self: World, value: tuple[str, int]) -> list[tuple[str, int]]:
        sent.append(value)
        return found

    monkeypatch.setattr(World, "gather", gather)
    world = replace(World(Mesh.single(), torch.device("cpu")), device=torch.device(device), size=len(found))
    assert memory.least_memory(world) == least
    assert sent[0][1] == found[0][1] and (sent[0][0] == "GPU of rank 0") is (device == "cuda")
