"""The folder of the runs: is it writable, and is there space for the checkpoints? The data: is it there?"""

from __future__ import annotations

import os
import secrets
from dataclasses import replace
from pathlib import Path

from sleeptrain.doctor.finding import Case, Finding, failed, ok, skipped
from sleeptrain.errors import ConfigError, os_reason
from sleeptrain.files import write_whole
from sleeptrain.remote import UrlPath, named_place
from sleeptrain.terminal import hide_credentials

GIB = 2**30
LEAST = GIB  # bytes that must be free in any case
DEFAULT_ROOT = "runs"


def check_disk(case: Case) -> Finding:
    """Write, sync, rename and remove a file in the folder of the runs, or in the nearest parent that exists."""
    if (problem := obstacle(root_of(case))) is not None:
        return failed(problem, "move it away, or set run.root to another folder")
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
    """Check the space for the checkpoints that the run keeps, and for one that it writes beside them."""
    if case.config is None:
        return skipped("no settings were given")
    from sleeptrain.checkpoint.folder import checkpoint_folder
    from sleeptrain.doctor.sizes import checkpoint_bytes, num_kept
    from sleeptrain.plan.layout import vocabulary

    saved, model = checkpoint_folder(case.config), case.config.model
    if isinstance(saved, UrlPath):
        return skipped(f"the checkpoints are in an object store, {saved}")
    place = existing(saved)
    try:
        model = replace(model, vocab_size=model.vocab_size or vocabulary(case.config))
    except ConfigError:
        return skipped("the data has no readable vocabulary")  # check_data reports the error
    config = replace(case.config, model=model)
    size, number = checkpoint_bytes(config), num_kept(config) + 1
    there = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
    needed, free = max(size * number - there, 0), free_bytes(place)
    listed = f"{number} checkpoints of {size / GIB:.2f} GiB"
    details = {"free": free, "checkpoint": size, "checkpoints": number, "there": there}
    if free < needed:
        problem = f"{place} has {free / GIB:.2f} GiB free; {listed} need {needed / GIB:.2f} more"
        return failed(problem, "free space, set run.root to another disk, or lower checkpoint.keep", **details)
    return ok(f"{listed}, {free / GIB:.1f} GiB free", **details)


def check_data(case: Case) -> Finding:
    """Open the inputs of the run: the tokenizer, the index of each source, the checkpoint of `run.init_from`.

    Raises UserError: an input is missing, or the checkpoint has another tokenizer.
    """
    if case.config is None:
        return skipped("no settings were given")
    from sleeptrain.checkpoint.find import named_checkpoint
    from sleeptrain.checkpoint.folder import checkpoint_folder, checkpoints
    from sleeptrain.checkpoint.vocabulary import check_start_tokenizer
    from sleeptrain.data.source import build_source
    from sleeptrain.distributed.launch import find_device
    from sleeptrain.distributed.mesh import Mesh
    from sleeptrain.distributed.world import World

    names = [case.config.data.source]
    tokenizer = None
    if case.config.data.source == "shards":
        names = [hide_credentials(source.train) for source in case.config.data.shards.sources]
    if case.config.data.source == "shards" or case.config.run.init_from:
        shards = replace(case.config.data.shards, workers=1)
        tokenizer = build_source(replace(case.config.data, shards=shards)).tokenizer_hash
    if case.config.run.init_from:
        alone, run = World(Mesh.single(), find_device("cpu")), case.config.run
        place = named_checkpoint(named_place(run.init_from), alone, "run.init_from", run.allow_older)
        if not checkpoints(checkpoint_folder(case.config)):  # a resumed run does not read init_from
            check_start_tokenizer(place, tokenizer, case.config.data.source, run.allow_changes)
        names.append(str(place))
    return ok(", ".join(names))


def root_of(case: Case) -> Path:
    return Path(DEFAULT_ROOT if case.config is None else case.config.run.root)


def obstacle(folder: Path) -> str | None:
    """Why a folder cannot be created: a file in its path, or a name that the system refuses. None if neither."""
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
    disk = os.statvfs(place)
    return disk.f_bavail * disk.f_frsize
