"""Stack traces of all threads of this process."""

from __future__ import annotations

import faulthandler
import tempfile
from pathlib import Path

from sleeptrain.files import write_whole
from sleeptrain.watch.progress import Location


def python_stacks() -> str:
    """The Python stacks of all threads, the newest call first. Works even if a thread hangs."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def stacks_file(run_folder: Path, location: Location, rank: int) -> Path:
    begun = "start" if location.step is None else f"step-{location.step:08d}"
    return run_folder / "stacks" / f"{begun}-rank-{rank}.txt"


def write_stacks(path: Path, head: str, stacks: str) -> None:
    write_whole(path, f"{head}\n\n{stacks}".encode())
