"""Finds the newest whole checkpoint, the same in all processes."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

from sleeptrain.checkpoint.folder import MANIFEST, checkpoints, checkpoints_of, find_damage, step_of
from sleeptrain.distributed.world import World
from sleeptrain.errors import DataError
from sleeptrain.remote import Location, UrlPath
from sleeptrain.terminal import say


class NoneWhole(DataError):
    """All checkpoints of a folder are damaged."""


@dataclass(frozen=True)
class Found:
    """The result of a search for a checkpoint.

    whole: the newest whole checkpoint; None without checkpoints.
    damaged: newer, damaged checkpoints, each with its damage.
    """

    whole: Location | None
    damaged: dict[Location, str]


def newest_whole(folder: Location, world: World, last: int | None = None) -> Found:
    """Searches a folder for the newest whole checkpoint. All processes together read each candidate, newest first.

    last: checkpoints of later steps are skipped; None: none is.
    Raises NoneWhole if all checkpoints are damaged, DataError if the processes see different checkpoints.
    """
    candidates = [path for path in checkpoints(folder) if last is None or step_of(path) <= last]
    if not world.agree([path.name for path in candidates]):
        raise DataError(f"the processes see different files in {folder}: put run.root where all can read it")
    damaged: dict[Location, str] = {}
    for path in reversed(candidates):
        damage = _damage(path, world)
        if damage is None:
            return Found(path, damaged)
        damaged[path] = damage
    if damaged:
        listed = "; ".join(f"{path.name}: {damage}" for path, damage in damaged.items())
        raise NoneWhole(
            f"no checkpoint in {folder} is whole ({listed}); put a whole copy of one there, or begin anew, with "
            "another run.name or with run.start_over=true"
        )
    return Found(None, {})


def named_checkpoint(place: Location, world: World, setting: str = "", allow_older: bool = False) -> Location:
    """The checkpoint at a path: the path itself, or the newest checkpoint of the run in it.

    setting: the setting that names the path, if any.
    allow_older: if the newest checkpoint is damaged, take the newest whole one; the main process reports it.
    Raises DataError without a checkpoint, for a damaged one, and where a run's settings name a URL.
    """
    if world.all_or_raise(lambda: (place / MANIFEST).is_file())[0]:
        if damage := _damage(place, world):
            raise DataError(f"checkpoint {place} is damaged: {damage}")
        return place
    saved = world.from_first(checkpoints_of(place))
    if isinstance(saved, UrlPath) and saved != place:
        raise DataError(
            f"the settings of {place}, which may come from somebody else, say that its checkpoints are in {saved}; "
            "name that place instead if you trust it"
        )
    found = newest_whole(saved, world)
    named = f"{setting}={place}" if setting else str(place)
    if found.whole is None:
        raise DataError(f"{named} is neither a checkpoint nor the folder of a run that has one")
    if found.damaged and not allow_older:
        older = "run.allow_older=true" if setting else "--allow-older (of lm_eval allow_older=True)"
        raise DataError(
            f"{named}: {_listed(found.damaged)}; to take the newest whole one name it, {found.whole}, or add {older}"
        )
    if found.damaged and world.is_main:
        say(f"sleeptrain: {named}: {_listed(found.damaged)}; {found.whole.name} is taken", sys.stderr)
    return found.whole


def _listed(damaged: Mapping[Location, str]) -> str:
    """The damaged checkpoints in words: `step-00000012 is damaged (the checksum of ...)`, joined by commas."""
    return ", ".join(f"{path.name} is damaged ({damage})" for path, damage in damaged.items())


def _damage(path: Location, world: World) -> str | None:
    by_rank = world.all_or_raise(lambda: find_damage(path, world.rank, world.size))
    return next((damage for damage in by_rank if damage is not None), None)
