"""What a checkpoint costs the training loop, against a plain torch.save of the same state, and what a resume costs.

A run of 8 blocks (width 256) is trained in one process and in two pipeline stages, six steps at a time, with a
checkpoint at their beginning and without. The stall is the difference: the call to save, the slower steps while the
files are written, and the wait for what is not written by the sixth. torch.save writes the same tensors, already in
host memory, each process its own, and all wait for it.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.multiprocessing as mp

from benchmarks import Row
from sleeptrain.checkpoint.find import newest_whole
from sleeptrain.checkpoint.read import TensorFiles
from sleeptrain.config import Config
from sleeptrain.config.compose import compose
from sleeptrain.config.overrides import override
from sleeptrain.distributed.launch import join
from sleeptrain.distributed.world import World
from sleeptrain.sleep.curriculum import step_shape
from sleeptrain.stop import StopRequest
from sleeptrain.train.open_run import open_run
from sleeptrain.train.run_state import Run
from sleeptrain.train.status import Status
from sleeptrain.train.stopping import Stopping
from sleeptrain.train.try_step import try_step
from sleeptrain.watch.progress import Progress

PLACES = {"one process": 1, "two stages": 2}
GOAL = 0.5  # of the stall of torch.save
STEPS = 6  # from one checkpoint to the next


def disk(path: Path) -> str:
    """The file system that holds a path, where Linux tells it."""
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return "an unknown disk"
    found = [line.split()[:3] for line in mounts.read_text().splitlines()]
    device, _, kind = max((m for m in found if path.is_relative_to(m[1])), key=lambda m: len(m[1]))
    return f"{kind} on {device}"


METHOD = (
    "one thread a process; wall time; the least of several; synced files in "
    f"{disk(Path(tempfile.gettempdir()).resolve())}, read back from the page cache"
)


def run(quick: bool) -> list[Row]:
    rounds = 2 if quick else 6
    torch.set_num_threads(1)
    return [row for place, size in PLACES.items() for row in _rows(place, _measured(size, rounds))]


def _rows(place: str, found: dict[str, float]) -> list[Row]:
    """Seconds and bytes as measured, in rows."""
    step, stall = found["without"] / STEPS, max(found["with"] - found["without"], found["call"])
    milliseconds = {
        "a step": step,
        "stall": stall,
        "stall, the call alone": found["call"],
        "stall of torch.save": found["torch.save"],
        "resume, checksums": found["verify"],
        "resume, reading": found["read"],
    }
    return [
        Row(f"{place}: state", found["bytes"] / 2**20, "MiB", better="lower"),
        Row(f"{place}: stall against torch.save", stall / found["torch.save"], "x", GOAL, "lower"),
        Row(f"{place}: stall of a step", 100 * stall / step, "%", better="lower"),
        *(Row(f"{place}: {name}", 1e3 * seconds, "ms", better="lower") for name, seconds in milliseconds.items()),
    ]


def _measured(size: int, rounds: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        if size == 1:
            return _measure(place, size, rounds)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        mp.spawn(_rank, (place, size, rounds, port), nprocs=size)
        return json.loads((place / "measured.json").read_text())


def _rank(rank: int, place: Path, size: int, rounds: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    found = _measure(place, size, rounds)
    if rank == 0:
        (place / "measured.json").write_text(json.dumps(found))


def _config(place: Path, stages: int) -> Config:
    return compose([
        "experiment=rule110",
        "model.layers=[gated_deltanet,attention,gated_deltanet,attention,gated_deltanet,attention,gated_deltanet,attention]",
        "model.dim=256",
        "model.ffn_dim=768",
        "data.batch=2",
        "train.micro_batch=1",
        "train.tokens=1000000000",
        "train.device=cpu",
        "train.threads=1",
        "optim.warmup_fraction=0",
        "checkpoint.keep=1",
        "wandb.mode=disabled",
        override("run.root", place),
        "run.name=r",
        f"parallel.pipeline={stages}",
    ])  # fmt: skip


def _measure(place: Path, size: int, rounds: int) -> dict[str, float]:
    world = join(config := _config(place, size))
    stopping, status = Stopping(None, StopRequest(), world), Status(place / "r", world.is_main)
    made = open_run(config, world, Progress(), stopping, status)
    assert made is not None
    _steps(made, 1)
    least: dict[str, float] = {}
    for _ in range(rounds):
        for name, seconds in _round(made, place).items():
            least[name] = min(least.get(name, seconds), seconds)
    own = made.engine.local_tensors(made.carried)
    size_of_all = world.sum(sum(tensor.nbytes for tensor in own.values()))[0]
    made.close()
    status.lease.release()
    world.close()
    return least | {"bytes": size_of_all}


def _round(made: Run, place: Path) -> dict[str, float]:
    """Seconds."""
    world, found = made.world, dict[str, float]()

    def steps_beside_save() -> None:
        found["call"] = _seconds(world, made.save)
        _steps(made, STEPS)
        made.saver.wait()

    found["without"] = _seconds(world, lambda: _steps(made, STEPS))
    found["with"] = _seconds(world, steps_beside_save)
    own = made.engine.local_tensors(made.carried)
    found["torch.save"] = _seconds(world, lambda: _torch_save(own, place / f"plain-{world.rank}"))
    found["verify"] = _seconds(world, lambda: newest_whole(made.saver.folder, world))
    newest = newest_whole(made.saver.folder, world).whole
    assert newest is not None
    found["read"] = _seconds(world, lambda: made.engine.load(TensorFiles(newest)))
    return found


def _seconds(world: World, action: Callable[[], object]) -> float:
    """Until all processes have done it."""
    world.any(False)
    start = time.perf_counter()
    action()
    world.any(False)
    return time.perf_counter() - start


def _steps(made: Run, count: int) -> None:
    for _ in range(count):
        shape = step_shape(made.config, made.tokens, made.step)
        read = made.next_batch(shape.batch)
        assert read is not None, "nobody asks it to stop"
        batch, num_tokens = read
        made.advance(batch, num_tokens, try_step(made, batch, shape, 1.0, None).result.state)


def _torch_save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    with open(path, "wb") as file:
        torch.save(tensors, file)
        file.flush()
        os.fsync(file.fileno())
