"""Where runs are kept: whether it can be written to and holds what will be kept; whether the data is there."""

from __future__ import annotations

import os
import secrets
from dataclasses import replace
from pathlib import Path

from sleeptrain.doctor.finding import Case, Finding, failed, ok, skipped
from sleeptrain.errors import ConfigError, os_reason
from sleeptrain.files import write_whole
from sleeptrain.terminal import hide_credentials

GIB = 2**30
LEAST = GIB  # free, whatever a run keeps
DEFAULT_ROOT = "runs"


def check_disk(case: Case) -> Finding:
    """A file is written, synced, renamed and removed where the run's folder is or will be."""
    if (found := obstacle(root_of(case))) is not None:
        return failed(found, "move it away, or set run.root to another folder")
    place = existing(root_of(case))
    probe = place / f".sleeptrain-doctor-{secrets.token_hex(4)}"
    try:
        write_whole(probe, b"sleeptrain doctor\n" * 4096)
        probe.unlink()
    except OSError as error:
        cure = "make it writable, free space, or set run.root to a folder that is"
        return failed(f"{place} cannot be written to and synced: {error.strerror or error}", cure)
    finally:
        probe.unlink(missing_ok=True)
    free = free_bytes(place)
    if free < LEAST:
        cure = "free space, or set run.root to another disk"
        return failed(f"{place} has {free / GIB:.2f} GiB free, {LEAST / GIB:g} are needed", cure, free=free)
    return ok(f"{place} can be written to, {free / GIB:.1f} GiB free", free=free)


def check_space(case: Case) -> Finding:
    """For the checkpoints that the run will keep and the one that it writes besides."""
    if case.config is None:
        return skipped("no settings were given")
    from sleeptrain.config.resolved import run_folder
    from sleeptrain.doctor.sizes import checkpoint_bytes, num_kept
    from sleeptrain.plan.layout import vocabulary

    place, model = existing(root_of(case)), case.config.model
    try:
        model = replace(model, vocab_size=model.vocab_size or vocabulary(case.config))
    except ConfigError:
        return skipped("the data does not tell the vocabulary")  # which the check of the data tells of
    config = replace(case.config, model=model)
    size, number = checkpoint_bytes(config), num_kept(config) + 1
    there = sum(path.stat().st_size for path in (run_folder(case.config) / "checkpoints").rglob("*") if path.is_file())
    wanted, free = max(size * number - there, 0), free_bytes(place)
    told = f"{number} checkpoints of {size / GIB:.2f} GiB"
    details = {"free": free, "checkpoint": size, "checkpoints": number, "there": there}
    if free < wanted:
        said = f"{place} has {free / GIB:.2f} GiB free; {told} need {wanted / GIB:.2f} more"
        return failed(said, "free space, set run.root to another disk, or lower checkpoint.keep", **details)
    return ok(f"{told}, {free / GIB:.1f} GiB free", **details)


def check_data(case: Case) -> Finding:
    """Opens what the run would read: tokenizer, the index of each source, the checkpoint that it starts from.

    Raises UserError for what is missing, or where that checkpoint's tokenizer is another.
    """
    if case.config is None:
        return skipped("no settings were given")
    from sleeptrain.checkpoint.find import named_checkpoint
    from sleeptrain.checkpoint.folder import checkpoints
    from sleeptrain.checkpoint.vocabulary import check_start_tokenizer
    from sleeptrain.config.resolved import run_folder
    from sleeptrain.data.source import build_source
    from sleeptrain.distributed.launch import find_device
    from sleeptrain.distributed.mesh import Mesh
    from sleeptrain.distributed.world import World

    told = [case.config.data.source]
    tokenizer = None
    if case.config.data.source == "shards":
        told = [hide_credentials(source.train) for source in case.config.data.shards.sources]
    if case.config.data.source == "shards" or case.config.run.init_from:
        shards = replace(case.config.data.shards, workers=1)
        tokenizer = build_source(replace(case.config.data, shards=shards)).tokenizer_hash
    if case.config.run.init_from:
        alone, run = World(Mesh.single(), find_device("cpu")), case.config.run
        place = named_checkpoint(Path(run.init_from), alone, "run.init_from", run.allow_older)
        if not checkpoints(run_folder(case.config) / "checkpoints"):  # else nothing is taken from there any more
            check_start_tokenizer(place, tokenizer, case.config.data.source, run.allow_changes)
        told.append(str(place))
    return ok(", ".join(told))


def root_of(case: Case) -> Path:
    return Path(DEFAULT_ROOT if case.config is None else case.config.run.root)


def obstacle(folder: Path) -> str | None:
    """Why a folder cannot be made where that is to be seen: by a file in its way, or by its name."""
    folder = folder.absolute()
    for place in (folder, *folder.parents):
        try:
            os.lstat(place)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            return os_reason(error)
        return None if place.is_dir() else f"{place} is no folder"
    return None


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(place for place in [folder, *folder.parents] if os.path.isdir(place))


def free_bytes(place: Path) -> int:
    told = os.statvfs(place)
    return told.f_bavail * told.f_frsize
