"""The cost of a checkpoint for the training loop, against a plain torch.save of the same state; the cost of a resume.

A run of 8 blocks (width 256) is trained in one process and in two pipeline stages. Six steps are timed with a
checkpoint at their start, and without one. The stall is the difference: the call to save, the slower steps while the
files are written, and the wait for the rest of the files after the sixth step. With torch.save each process writes its
own tensors of the same state, which are already in host memory, and all processes wait for the end.
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
from sleeptrain.checkpoint.place import placed
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

LAYOUTS = {"one process": 1, "two stages": 2}
GOAL = 0.5  # stall, as a share of the stall of torch.save
STEPS = 6  # from one checkpoint to the next


def disk(path: Path) -> str:
    """The file system of a path, on Linux."""
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return "an unknown disk"
    lines = [line.split()[:3] for line in mounts.read_text().splitlines()]
    device, _, kind = max((m for m in lines if path.is_relative_to(m[1])), key=lambda m: len(m[1]))
    return f"{kind} on {device}"


METHOD = (
    "one thread a process; wall time; the least of several; synced files in "
    f"{disk(Path(tempfile.gettempdir()).resolve())}, read back from the page cache"
)


def run(quick: bool) -> list[Row]:
    rounds = 2 if quick else 6
    torch.set_num_threads(1)
    return [row for layout, size in LAYOUTS.items() for row in _rows(layout, _measure_layout(size, rounds))]


def _rows(layout: str, measured: dict[str, float]) -> list[Row]:
    """The rows of a layout. measured: seconds and bytes by name."""
    step, stall = measured["without"] / STEPS, max(measured["with"] - measured["without"], measured["call"])
    milliseconds = {
        "a step": step,
        "stall": stall,
        "stall, the call alone": measured["call"],
        "stall of torch.save": measured["torch.save"],
        "resume, checksums": measured["verify"],
        "resume, reading": measured["read"],
    }
    return [
        Row(f"{layout}: state", measured["bytes"] / 2**20, "MiB", better="lower"),
        Row(f"{layout}: stall against torch.save", stall / measured["torch.save"], "x", GOAL, "lower"),
        Row(f"{layout}: stall of a step", 100 * stall / step, "%", better="lower"),
        *(Row(f"{layout}: {name}", 1e3 * seconds, "ms", better="lower") for name, seconds in milliseconds.items()),
    ]


def _measure_layout(size: int, rounds: int) -> dict[str, float]:
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
    measured = _measure(place, size, rounds)
    if rank == 0:
        (place / "measured.json").write_text(json.dumps(measured))


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
    run = open_run(config, world, Progress(), stopping, status)
    assert run is not None
    _steps(run, 1)
    least: dict[str, float] = {}
    for _ in range(rounds):
        for name, seconds in _round(run, place).items():
            least[name] = min(least.get(name, seconds), seconds)
    tensors = run.engine.local_tensors(run.carried)
    num_bytes = world.sum(sum(placed(tensor).tensor.nbytes for tensor in tensors.values()))[0]
    run.close()
    status.lease.release()
    world.close()
    return least | {"bytes": num_bytes}


def _round(run: Run, place: Path) -> dict[str, float]:
    """Seconds of each part, by name."""
    world, seconds = run.world, dict[str, float]()

    def steps_beside_save() -> None:
        seconds["call"] = _seconds(world, run.save)
        _steps(run, STEPS)
        run.saver.wait()

    seconds["without"] = _seconds(world, lambda: _steps(run, STEPS))
    seconds["with"] = _seconds(world, steps_beside_save)
    tensors = {name: placed(tensor).tensor.clone() for name, tensor in run.engine.local_tensors(run.carried).items()}
    seconds["torch.save"] = _seconds(world, lambda: _torch_save(tensors, place / f"plain-{world.rank}"))
    seconds["verify"] = _seconds(world, lambda: newest_whole(run.saver.folder, world))
    newest = newest_whole(run.saver.folder, world).whole
    assert newest is not None
    seconds["read"] = _seconds(world, lambda: run.engine.load(TensorFiles(newest, world)))
    return seconds


def _seconds(world: World, action: Callable[[], object]) -> float:
    """Seconds until all processes have run `action`."""
    world.any(False)
    start = time.perf_counter()
    action()
    world.any(False)
    return time.perf_counter() - start


def _steps(run: Run, count: int) -> None:
    for _ in range(count):
        shape = step_shape(run.config, run.tokens, run.step)
        loaded = run.next_batch(shape)
        assert loaded is not None, "there is no stop request"
        result = try_step(run, loaded, shape, 1.0, None).result
        run.advance(loaded.batch, loaded.totals.tokens, result.flops, result.state)


def _torch_save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    with open(path, "wb") as file:
        torch.save(tensors, file)
        file.flush()
        os.fsync(file.fileno())
