"""The work folder: the state from which a killed preparation continues. It lies beside the target.

`plan.json` holds the settings and inputs, `units/` the complete units, `tokenizer/` the tokenizer and `result/` the
target while it is put together. When `result/` is complete, the file `publishing` is made, then `result/` gets the name
of the target, then the work folder is removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sleeptrain.errors import DataError
from sleeptrain.files import sync, write_whole
from sleeptrain.lease import Lease
from sleeptrain.prepare.split import SIDES
from sleeptrain.prepare.work_schema import PLAN_CHECKS, read_checked

DIFFERENCES_SHOWN = 5


class Work:
    """The work folder of the target `out`. `locked` makes the folder."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out.with_name(f".{out.name}.work")
        self.units = self.path / "units"
        self.result = self.path / "result"
        self.tokenizer = self.path / "tokenizer"
        self._plan = self.path / "plan.json"
        self._publishing = self.path / "publishing"
        self._lease = Lease(self.path, f"{out} is being prepared", "name another --out")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder and lock it. Raises LeaseError if another call, on any machine, works in it."""
        with self._lease:
            self._lease.take(os.environ.get("SLURM_JOB_ID"))
            yield

    def tidy(self, plan: dict[str, Any], force: bool) -> bool:
        """Remove leftovers. Returns True if a killed call with the same plan had already published its target.

        Work that was begun with another plan is removed with `force`; else it raises DataError, which lists the
        differences.
        """
        published = self._publishing.exists() and not self.result.exists()
        begun = self._begun_plan(force)
        if published or begun is None:
            self._clear()
        elif begun != plan:
            if not force:
                raise DataError(
                    f"{self.path} holds a preparation that was begun with other settings or inputs "
                    f"({_differences(begun, plan)}); repeat that call, name another --out, or drop it with --force"
                )
            self._clear()
        else:
            self._clear_partial()
        return published and begun == plan

    def begin(self, plan: dict[str, Any]) -> None:
        if not self._plan.exists():
            self.units.mkdir(exist_ok=True)
            write_whole(self._plan, json.dumps(plan).encode())

    def publish(self, replace: bool) -> None:
        """Give `result` the name of the target. An earlier target moves into the work folder, to be removed with it."""
        self._lease.check()
        self._publishing.touch()
        sync(self.path)
        if self.out.exists():
            if any(self.out.iterdir()) and not replace:
                raise DataError(f"{self.out} has appeared meanwhile and is not empty; move it away and call again")
            os.rename(self.out, self.path / "replaced")
        os.rename(self.result, self.out)
        sync(self.out.parent)

    def remove(self) -> None:
        """Remove the work folder. If a kill interrupts this, no plan is left, and the next call clears the rest."""
        self._clear()
        shutil.rmtree(self.path)

    def _begun_plan(self, force: bool) -> dict[str, Any] | None:
        """The plan of the work so far; None if there is none.

        Raises DataError if the plan is damaged; with `force` it returns None instead.
        """
        if not self._plan.exists():
            return None
        try:
            return read_checked(self._plan, PLAN_CHECKS, "drop the work so far with --force")
        except DataError:
            if not force:
                raise
            return None

    def _clear_partial(self) -> None:
        """Remove the partial files of killed processes: their names begin with a dot."""
        folders = (self.path, self.units, self.tokenizer, self.result, *(self.result / side for side in SIDES))
        for path in [path for folder in folders if folder.is_dir() for path in folder.glob(".*")]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _clear(self) -> None:
        """Remove all except the lease. The plan goes first: without it nobody continues from a half cleared folder."""
        self._plan.unlink(missing_ok=True)
        for path in self.path.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path != self._lease.path:
                path.unlink(missing_ok=True)  # a temporary file of a call that requests the lease may be gone


def changes(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The settings that differ, each with its old and new value."""
    return [f"{name} {earlier.get(name)}, now {now[name]}" for name in now if earlier.get(name) != now[name]]


def _differences(begun: dict[str, Any], plan: dict[str, Any]) -> str:
    differences = changes(begun["settings"], plan["settings"])
    before = {name: entry for name, *entry in begun["inputs"]}
    after = {name: entry for name, *entry in plan["inputs"]}
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            how = "changed" if name in before and name in after else "gone" if name in before else "new"
            differences.append(f"{name} {how}")
    num_more = len(differences) - DIFFERENCES_SHOWN
    return "; ".join(differences[:DIFFERENCES_SHOWN]) + (f"; {num_more} more" if num_more > 0 else "")
