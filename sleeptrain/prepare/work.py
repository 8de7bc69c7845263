"""The work folder: all that a killed preparation needs to go on, beside its target until the target is whole.

`plan.json` says what is being made, `units/` holds the units that are whole, `tokenizer/` the tokenizer, `result/` the
target while it is put together. When that is whole, the file `publishing` is made, then `result` takes the target's
name, then the work folder goes.
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
    """The work folder of the target `out`; none is made before `locked`."""

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
        """Make the folder and keep other calls away from it. Raises LeaseError where one is at work, anywhere."""
        with self._lease:
            self._lease.take(os.environ.get("SLURM_JOB_ID"))
            yield

    def tidy(self, plan: dict[str, Any], force: bool) -> bool:
        """Clear what is of no use; whether this very call was killed before, when its target already had its name.

        What was begun with another plan is refused (DataError, with the differences), or cleared with `force`.
        """
        published = self._publishing.exists() and not self.result.exists()
        begun = self._begun_plan(force)
        if published or begun is None:
            self._clear()
        elif begun != plan:
            if not force:
                raise DataError(
                    f"{self.path} holds a preparation that was begun otherwise ({_differences(begun, plan)}); "
                    f"repeat that call, name another --out, or drop it with --force"
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
        """Give `result` the name of the target; an earlier target goes with the work folder."""
        self._lease.check()
        self._publishing.touch()
        sync(self.path)
        if self.out.exists():
            if any(self.out.iterdir()) and not replace:
                raise DataError(f"{self.out} came to be meanwhile and is not empty; move it away and call again")
            os.rename(self.out, self.path / "replaced")
        os.rename(self.result, self.out)
        sync(self.out.parent)

    def remove(self) -> None:
        """What is left after a kill in here has no plan, and is cleared at the next call."""
        self._clear()
        shutil.rmtree(self.path)

    def _begun_plan(self, force: bool) -> dict[str, Any] | None:
        """None where there is none, or a damaged one that `force` drops. Raises DataError for a damaged one."""
        if not self._plan.exists():
            return None
        try:
            return read_checked(self._plan, PLAN_CHECKS, "drop the work so far with --force")
        except DataError:
            if not force:
                raise
            return None

    def _clear_partial(self) -> None:
        """Remove what killed processes were writing: its names begin with a dot."""
        folders = (self.path, self.units, self.tokenizer, self.result, *(self.result / side for side in SIDES))
        for left in [path for folder in folders if folder.is_dir() for path in folder.glob(".*")]:
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink(missing_ok=True)

    def _clear(self) -> None:
        """Empty the folder, but for the lease: first the plan, so that no half cleared folder is taken for a whole."""
        self._plan.unlink(missing_ok=True)
        for path in self.path.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path != self._lease.path:
                path.unlink(missing_ok=True)  # another call that asks for the lease has a file for a moment


def changes(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The settings that differ, in words."""
    return [f"{name} {earlier.get(name)}, now {now[name]}" for name in now if earlier.get(name) != now[name]]


def _differences(begun: dict[str, Any], plan: dict[str, Any]) -> str:
    found = changes(begun["settings"], plan["settings"])
    before = {name: entry for name, *entry in begun["inputs"]}
    after = {name: entry for name, *entry in plan["inputs"]}
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            how = "changed" if name in before and name in after else "gone" if name in before else "new"
            found.append(f"{name} {how}")
    more = len(found) - DIFFERENCES_SHOWN
    return "; ".join(found[:DIFFERENCES_SHOWN]) + (f"; {more} more" if more > 0 else "")
